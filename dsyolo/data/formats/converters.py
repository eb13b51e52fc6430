"""The converters under one name, for the command line."""

from __future__ import annotations

from dsyolo.data.formats.coco import convert_coco
from dsyolo.data.formats.voc import convert_voc
from dsyolo.data.formats.writer import Conversion

__all__ = ["Conversion", "convert_coco", "convert_voc"]
