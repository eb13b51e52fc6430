"""Detecting objects with trained weights: for the commands, and for programs of users."""
