"""What a run reports and leaves behind: metrics, plots, artifacts."""
