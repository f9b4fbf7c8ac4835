"""How samples get to the device: placements, fetchers, worker processes."""
