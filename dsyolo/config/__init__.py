"""What people give: the command line, recipes, data.yaml and the DeepSpeed JSON, resolved once."""
