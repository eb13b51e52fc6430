"""Finds the strategies that fit given GPUs, their costs and the reasons: before anything runs, on any machine."""
