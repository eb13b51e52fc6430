"""The input of a run: the command line, recipes, data.yaml and the DeepSpeed JSON, resolved once."""
