"""All that knows of ranks: the only importers of deepspeed and torch.distributed."""
