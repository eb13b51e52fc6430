"""dsyolo: a memory-optimized, large-scale trainer for YOLOv5 detectors on DeepSpeed."""

__version__ = "0.1.0"
