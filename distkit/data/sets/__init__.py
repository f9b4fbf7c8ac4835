"""Data sets: images with and without masks, tokens, text, synthetic samples."""
