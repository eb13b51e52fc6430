"""Defaults of YOLOv5 7.0 and Ultralytics 8 that have no meaning here: people copy them from an args.yaml or opt.yaml."""

from dsyolo.config.foreign_options import SWITCH

# By the option's name with underscores. Others are aliases, or the tables take them.
DEFAULTS = {
    "amp": "true",
    "angle": "1.0",
    "artifact_alias": "latest",
    "auto_augment": "randaugment",
    "bbox_interval": "-1",
    "box": "7.5",
    "dfl": "1.5",
    "erasing": "0.4",
    "format": "torchscript",
    "kobj": "1.0",
    "line_thickness": "3",
    "lr0": "0.01",
    "mask_ratio": "4",
    "momentum": "0.937",
    "nbs": "64",
    "optimizer": "auto",
    "overlap_mask": "true",
    "plots": "true",
    "pose": "12.0",
    "rle": "1.0",
    "save": "true",
    "simplify": "true",
    "topk_all": "100",
    "topk_per_class": "100",
    "tracker": "botsort.yaml",
    "weight_decay": "0.0005",
    "workspace": "4",
}


def is_default(key: str, value: str | None) -> bool:
    """Return whether a value is the other programs' default of an option that has no meaning here."""
    default = DEFAULTS.get(key)
    if default is None or value is None:
        return False
    text = value.strip().lower()
    if default in SWITCH:
        return SWITCH.get(text) == SWITCH[default]
    try:
        return text == default or float(text) == float(default)
    except ValueError:
        return False
