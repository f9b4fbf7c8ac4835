"""What a run leaves on disk: digests and weights."""
