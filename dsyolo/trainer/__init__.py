"""The training loop and what is built for it."""
