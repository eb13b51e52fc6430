"""Checkpoints of named tensors: writing, reading, choosing the latest."""
