"""The way of an image: from files to batches."""
