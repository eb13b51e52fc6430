"""What a training would need and how fast it would be, for every strategy, before there is a GPU."""
