"""Ranks and hosts: rendezvous, watchdog, preemption, run lock, collectives. Imports torch.distributed, not DeepSpeed."""
