"""Boxes, assignment, loss, post-processing, metrics."""
