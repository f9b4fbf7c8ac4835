"""What the commands do with checkpoints: list, compare, export, prune."""
