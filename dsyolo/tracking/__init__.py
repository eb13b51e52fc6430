"""The reports and files of a run: metrics, plots, artifacts."""
