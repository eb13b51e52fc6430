"""The recipe of a training: schedule, gains of the loss, augmentation; and its presets.

Source of the numbers: docs/yolov5.md.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

NOMINAL_BATCH = 64  # images in a step that recipes are made for
PRESETS = ("low", "med", "high")


def knob(
    default: Any, text: str, group: str, *, learned: bool = False, alone: str = "", **limits: Any
) -> Any:
    """Describe a field: its default, help text, help group, whether it changes what is learned, and its limits.

    Args:
        alone: the value of the option where the command line gives none.
    """
    extra: dict[str, Any] = {"group": group, "learned": learned, "alone": alone}
    return Field(default, description=text, json_schema_extra=extra, **limits)


def _recipe(default: Any, text: str, group: str, **limits: Any) -> Any:
    return knob(default, text, group, learned=True, **limits)


def extra_of(field: FieldInfo, key: str) -> Any:
    """Return what `knob` was given as `key`."""
    assert isinstance(field.json_schema_extra, dict), field
    return field.json_schema_extra[key]


class Recipe(BaseModel):
    """Schedule, loss gains and augmentation. The defaults are preset `low`; source of the numbers: docs/yolov5.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lrf: float = _recipe(0.01, "final lr as a fraction of the peak", "recipe: schedule", ge=0, le=1)
    schedule: Literal["linear", "cosine"] = _recipe("linear", "shape of the lr decay", "recipe: schedule")
    lr_scaling: Literal["none", "linear", "sqrt"] = _recipe(
        "none",
        "scale the JSON's lr, meant for 64 images per step, by batch / 64 or its square root",
        "recipe: schedule",
    )
    warmup_epochs: float = _recipe(3.0, "length of the warm-up in epochs", "recipe: schedule", ge=0)
    # At least 100 iterations of 16 images; counted in images, it does not depend on the batch.
    warmup_min_images: int = _recipe(1600, "shortest warm-up in images", "recipe: schedule", ge=0)
    warmup_bias_lr: float = _recipe(0.1, "lr of biases at the start of the warm-up", "recipe: schedule", ge=0)
    warmup_momentum: float = _recipe(
        0.8, "momentum at the start of the warm-up", "recipe: schedule", ge=0, lt=1
    )

    box: float = _recipe(0.05, "gain of the box loss", "recipe: loss", ge=0)
    cls: float = _recipe(0.5, "gain of the class loss", "recipe: loss", ge=0)
    obj: float = _recipe(1.0, "gain of the objectness loss", "recipe: loss", ge=0)
    cls_pw: float = _recipe(1.0, "positive weight of the class loss", "recipe: loss", gt=0)
    obj_pw: float = _recipe(1.0, "positive weight of the objectness loss", "recipe: loss", gt=0)
    fl_gamma: float = _recipe(0.0, "gamma of the focal factor, 0 for none", "recipe: loss", ge=0, le=10)
    label_smoothing: float = _recipe(0.0, "epsilon of label smoothing", "recipe: loss", ge=0, lt=1)
    anchor_t: float = _recipe(4.0, "largest ratio of box to anchor sides", "recipe: loss", gt=1)

    hsv_h: float = _recipe(0.015, "gain of the hue", "recipe: augmentation", ge=0, le=1)
    hsv_s: float = _recipe(0.7, "gain of the saturation", "recipe: augmentation", ge=0, le=1)
    hsv_v: float = _recipe(0.4, "gain of the brightness", "recipe: augmentation", ge=0, le=1)
    degrees: float = _recipe(0.0, "largest rotation in degrees", "recipe: augmentation", ge=0, le=180)
    translate: float = _recipe(
        0.1, "largest shift as a fraction of the image's side", "recipe: augmentation", ge=0, lt=1
    )
    scale: float = _recipe(
        0.5, "largest change of scale, as in 1 +- scale", "recipe: augmentation", ge=0, lt=1
    )
    shear: float = _recipe(0.0, "largest shear in degrees", "recipe: augmentation", ge=0, lt=90)
    perspective: float = _recipe(
        0.0, "largest perspective, per pixel", "recipe: augmentation", ge=0, le=0.001
    )
    flipud: float = _recipe(0.0, "probability of a vertical flip", "recipe: augmentation", ge=0, le=1)
    fliplr: float = _recipe(0.5, "probability of a horizontal flip", "recipe: augmentation", ge=0, le=1)
    mosaic: float = _recipe(1.0, "probability of a mosaic of four images", "recipe: augmentation", ge=0, le=1)
    mixup: float = _recipe(
        0.0, "probability of a mix with a second mosaic", "recipe: augmentation", ge=0, le=1
    )
    copy_paste: float = _recipe(0.0, "probability of pasting objects", "recipe: augmentation", ge=0, le=1)
    multi_scale: bool = _recipe(
        False, "draw the image size of each batch from [0.5, 1.5] imgsz", "recipe: augmentation"
    )


RECIPE_KEYS = frozenset(Recipe.model_fields)
DEFAULT_RECIPE = Recipe()


def preset(name: str) -> Recipe:
    """Return the packaged recipe `low`, `med` or `high`."""
    assert name in PRESETS, name
    text = (resources.files("dsyolo") / "config" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe(**yaml.safe_load(text))
