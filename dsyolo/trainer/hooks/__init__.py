"""Everything that a run does besides training: one hook a file, in the order that trainer/build.py lists."""
