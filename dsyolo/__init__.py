"""dsyolo: a memory-optimized, large-scale trainer for YOLOv5 detectors on DeepSpeed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsyolo.inference.detector import Detector, ImageDetections, load

__version__ = "0.1.0"
__all__ = ["Detector", "ImageDetections", "load"]


def __getattr__(name: str) -> Any:
    """Import what a program asks for only then: it needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsyolo.inference import detector

    return getattr(detector, name)
