"""The recipe of a training: schedule, gains of the loss, augmentation; and its presets.

Source of the numbers: docs/yolov5.md.
"""

from functools import partial
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

NOMINAL_BATCH = 64  # images in a step that recipes are made for
PRESETS = ("low", "med", "high")


def knob(
    default: Any,
    text: str,
    group: str,
    *,
    learned: bool = False,
    alone: str = "",
    unset: str = "none",
    **limits: Any,
) -> Any:
    """Describe a field: its default, help text, help group, whether it changes what is learned, and its limits.

    `alone` is the value of the option when it is given without one (argparse's const), `unset` what the help calls a
    default of None.
    """
    extra: dict[str, Any] = {"group": group, "learned": learned, "alone": alone, "unset": unset}
    return Field(default, description=text, json_schema_extra=extra, **limits)


_schedule = partial(knob, group="recipe: schedule", learned=True)
_loss = partial(knob, group="recipe: loss", learned=True)
_augment = partial(knob, group="recipe: augmentation", learned=True)


def extra_of(field: FieldInfo, key: str) -> Any:
    """Return what `knob` was given as `key`."""
    assert isinstance(field.json_schema_extra, dict), field
    return field.json_schema_extra[key]


class Recipe(BaseModel):
    """Schedule, loss gains and augmentation. The defaults are preset `low`; source of the numbers: docs/yolov5.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lrf: float = _schedule(0.01, "final lr as a fraction of the peak", ge=0, le=1)
    schedule: Literal["linear", "cosine"] = _schedule("linear", "shape of the lr decay")
    lr_scaling: Literal["none", "linear", "sqrt"] = _schedule(
        "none", "scale the JSON's lr, meant for 64 images per step, by batch / 64 or its square root"
    )
    warmup_epochs: float = _schedule(3.0, "length of the warm-up in epochs", ge=0)
    # At least 100 iterations of 16 images; counted in images, it does not depend on the batch.
    warmup_min_images: int = _schedule(1600, "shortest warm-up in images", ge=0)
    warmup_bias_lr: float = _schedule(0.1, "lr of biases at the start of the warm-up", ge=0)
    warmup_momentum: float = _schedule(0.8, "momentum at the start of the warm-up", ge=0, lt=1)

    box: float = _loss(0.05, "gain of the box loss", ge=0)
    cls: float = _loss(0.5, "gain of the class loss", ge=0)
    obj: float = _loss(1.0, "gain of the objectness loss", ge=0)
    cls_pw: float = _loss(1.0, "weight of positives in the class loss", gt=0)
    obj_pw: float = _loss(1.0, "weight of positives in the objectness loss", gt=0)
    fl_gamma: float = _loss(0.0, "gamma of the focal factor, 0 for none", ge=0, le=10)
    label_smoothing: float = _loss(0.0, "epsilon of label smoothing", ge=0, lt=1)
    anchor_t: float = _loss(4.0, "largest ratio of box to anchor sides", gt=1)

    hsv_h: float = _augment(0.015, "largest relative change of the hue", ge=0, le=1)
    hsv_s: float = _augment(0.7, "largest relative change of the saturation", ge=0, le=1)
    hsv_v: float = _augment(0.4, "largest relative change of the brightness", ge=0, le=1)
    degrees: float = _augment(0.0, "largest rotation in degrees", ge=0, le=180)
    translate: float = _augment(0.1, "largest shift as a fraction of the image's side", ge=0, lt=1)
    scale: float = _augment(0.5, "largest change of scale, as in 1 +- scale", ge=0, lt=1)
    shear: float = _augment(0.0, "largest shear in degrees", ge=0, lt=90)
    perspective: float = _augment(0.0, "largest perspective, per pixel", ge=0, le=0.001)
    flipud: float = _augment(0.0, "probability of a vertical flip", ge=0, le=1)
    fliplr: float = _augment(0.5, "probability of a horizontal flip", ge=0, le=1)
    mosaic: float = _augment(1.0, "probability of a mosaic of four images", ge=0, le=1)
    mixup: float = _augment(0.0, "probability of a mix with a second mosaic", ge=0, le=1)
    close_mosaic: int = _augment(0, "epochs at the end of the run without mosaic and mixup", ge=0)
    copy_paste: float = _augment(0.0, "probability of pasting objects", ge=0, le=1)
    multi_scale: bool = _augment(False, "draw the image size of each batch from [0.5, 1.5] imgsz")


RECIPE_KEYS = frozenset(Recipe.model_fields)
DEFAULT_RECIPE = Recipe()


def preset(name: str) -> Recipe:
    """Return the packaged recipe `low`, `med` or `high`."""
    assert name in PRESETS, name
    text = (resources.files("dsyolo") / "config" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe(**yaml.safe_load(text))
