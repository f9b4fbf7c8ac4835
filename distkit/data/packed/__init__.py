"""Images packed into a few large files, written once and memory-mapped."""
