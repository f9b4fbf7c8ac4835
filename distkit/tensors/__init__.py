"""Tensors in pieces: sharded over ranks, in runs of elements, in a module's buffers."""
