"""Which strategy fits which GPUs, what it costs, and why: before anything runs, on any machine."""
