"""The converters under one name, for the command line."""

from __future__ import annotations

from dsyolo.data.coco import convert_coco
from dsyolo.data.voc import convert_voc
from dsyolo.data.writer import Conversion

__all__ = ["Conversion", "convert_coco", "convert_voc"]
