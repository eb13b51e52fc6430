"""`dsyolo doctor`: check before a run whether it can start on all of its hosts."""
