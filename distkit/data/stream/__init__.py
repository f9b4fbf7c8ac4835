"""The sample stream (C1): which samples a step reads, in which order, with which random draws."""
