"""Images packed into a few large safetensors files, written once and memory-mapped."""
