"""The run configuration: what is learned, and where it goes. Its command line is built from its fields: `command_line`.

How it runs (batch sizes, precision, ZeRO, optimizer and its lr) is the DeepSpeed JSON's: see `ds_config`.
A knob has one owner; `JSON_KNOBS` names the owner of those that people look for here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import BadYamlError, parse_yaml, read_text, shortened
from dsyolo.base.user_code import is_reference
from dsyolo.config.cli_args import extra_of
from dsyolo.config.messages import did_you_mean, validate

MODELS = tuple(f"yolov5{size}{levels}" for levels in ("", "6") for size in "nsmlx")
RECOMPUTE_RULE = '"none", "blocks" or a budget in GiB like "4.5GiB"'
NOMINAL_BATCH = 64  # images a step that recipes are made for
PRESETS = ("low", "med", "high")
AUTO = "auto"  # --deepspeed_config: planned for the machine (planner/auto.py); in the JSON: this value is

# Options of other trainers, and YOLOv5's hyper-parameter names, whose owner is the DeepSpeed JSON.
JSON_KNOBS = {
    "accumulate": "gradient_accumulation_steps",
    "adam": "optimizer.type",
    "batch": "train_batch_size",
    "batch_size": "train_batch_size",
    "bf16": "bf16 or torch_autocast",
    "clip": "gradient_clipping",
    "fp16": "fp16 or torch_autocast",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "lr": "optimizer.params.lr",
    "lr0": "optimizer.params.lr",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "momentum": "optimizer.params.momentum",
    "nesterov": "optimizer.params.nesterov",
    "optimizer": "optimizer.type",
    "stages": "pipeline.stages",
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "weight_decay": "optimizer.params.weight_decay",
    "zero_stage": "zero_optimization.stage",
}


def _knob(
    default: Any, text: str, group: str, *, learned: bool = False, alone: str = "", **limits: float
) -> Any:
    """A field: its default, help text, help group, whether it changes what is learned, and its limits.

    `alone` is its value where the option stands without one.
    """
    extra: dict[str, Any] = {"group": group, "learned": learned, "alone": alone}
    return Field(default, description=text, json_schema_extra=extra, **limits)


def _recipe(default: Any, text: str, group: str, **limits: float) -> Any:
    return _knob(default, text, group, learned=True, **limits)


class Recipe(BaseModel):
    """Schedule, loss gains and augmentation. The defaults are preset `low`; source of the numbers: spec.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lrf: float = _recipe(0.01, "last lr as a fraction of the first", "recipe: schedule", ge=0, le=1)
    schedule: Literal["linear", "cosine"] = _recipe(
        "linear", "shape of the fall of the lr", "recipe: schedule"
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = _recipe(
        "none", "the JSON's lr is for 64 images a step: times batch / 64, or its root", "recipe: schedule"
    )
    warmup_epochs: float = _recipe(3.0, "length of the warm-up in epochs", "recipe: schedule", ge=0)
    # At least 100 iterations of 16 images; counted in images, it does not depend on the batch.
    warmup_min_images: int = _recipe(1600, "least length of the warm-up in images", "recipe: schedule", ge=0)
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
    translate: float = _recipe(0.1, "largest shift, of the image's side", "recipe: augmentation", ge=0, lt=1)
    scale: float = _recipe(
        0.5, "largest change of scale, as in 1 +- scale", "recipe: augmentation", ge=0, lt=1
    )
    shear: float = _recipe(0.0, "largest shear in degrees", "recipe: augmentation", ge=0, lt=90)
    perspective: float = _recipe(
        0.0, "largest perspective, per pixel", "recipe: augmentation", ge=0, le=0.001
    )
    flipud: float = _recipe(0.0, "probability of a flip upside down", "recipe: augmentation", ge=0, le=1)
    fliplr: float = _recipe(0.5, "probability of a flip left to right", "recipe: augmentation", ge=0, le=1)
    mosaic: float = _recipe(1.0, "probability of a mosaic of four images", "recipe: augmentation", ge=0, le=1)
    mixup: float = _recipe(
        0.0, "probability of a mix with a second mosaic", "recipe: augmentation", ge=0, le=1
    )
    copy_paste: float = _recipe(0.0, "probability of pasting objects", "recipe: augmentation", ge=0, le=1)
    multi_scale: bool = _recipe(False, "draw the size of a batch in [0.5, 1.5] imgsz", "recipe: augmentation")


class RunConfig(BaseModel):
    """One run. None means: found from the machine or from another field when the run starts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    deepspeed_config: str = _knob(
        "ds_configs/zero1.json",
        "DeepSpeed JSON: how it runs; from the working directory; auto: planned for this machine",
        "run",
    )
    data: str = _knob(..., "data set's YAML file", "run", learned=True)
    model: str = _knob(
        "yolov5n",
        "yolov5n, s, m, l, x, the same with 6 behind, or your own FILE.py:FUNCTION",
        "run",
        learned=True,
    )
    weights: str | None = _knob(None, "weights to start from", "run", learned=True)
    imgsz: int = _knob(640, "side of the training images in pixels", "run", learned=True)
    epochs: int = _knob(300, "epochs", "run", learned=True, ge=1)
    seed: int = _knob(0, "seed of everything drawn", "run", learned=True, ge=0, lt=2**63)
    hyp: str = _knob("low", "recipe: low, med, high or a YAML file", "run")
    resume: Literal["never", "always", "auto"] = _knob(
        "never",
        "go on with PROJECT/NAME where it stopped; auto: if it has a checkpoint",
        "run",
        alone="always",
    )
    project: str = _knob("runs", "folder of runs", "run", min_length=1)
    name: str = _knob("train", "folder of this run in the project", "run", min_length=1)

    workers: int | None = _knob(None, "loader processes per rank, auto: from the cores", "machine", ge=0)
    threads: int | None = _knob(None, "threads per rank, auto: from the cores", "machine", ge=1)
    recompute: str = _knob(
        "auto",
        "activations computed again: none, blocks, the fewest blocks for a budget: 4.5GiB, auto: the JSON says",
        "machine",
    )
    halve_micro_batch: bool = _knob(
        False,
        "half the JSON's micro-batch, twice its accumulation: a run sets it where memory ran out",
        "machine",
    )
    hang_timeout_s: float = _knob(
        600, "seconds without progress until all ranks end and the late one is named", "machine", ge=5
    )
    rendezvous_timeout_s: float = _knob(
        300, "seconds that ranks wait for one that has not come when the run starts", "machine", ge=5
    )
    memory_profile: Literal["start", "epochs", "off"] = _knob(
        "start", "when the memory of a step is measured, term by term", "machine"
    )
    time_profile: Literal["epochs", "steps", "off"] = _knob(
        "epochs",
        "where the time goes, told after every epoch; steps: each one's in steps.json too",
        "machine",
    )
    cache: Literal["none", "ram"] = _knob("none", "where decoded images are kept", "machine")

    ema: bool = _knob(True, "average the weights", "training", learned=True)
    ema_decay: float = _knob(0.9999, "decay of the average", "training", learned=True, gt=0, lt=1)
    ema_tau: float = _knob(2000, "updates over which the decay rises", "training", learned=True, gt=0)
    freeze_batchnorm: bool = _knob(False, "keep BatchNorm's statistics as they are", "training", learned=True)
    sync_batchnorm: bool = _knob(False, "BatchNorm over the images of all ranks", "training", learned=True)
    patience: int = _knob(
        100, "epochs without a better fitness before stopping, 0: never stop", "training", ge=0
    )
    val_every: int = _knob(1, "epochs between validations", "training", ge=1)
    save_every: int = _knob(1, "epochs between checkpoints", "training", ge=1)
    keep_checkpoints: int = _knob(2, "newest checkpoints kept, beside the best one", "training", ge=1)
    max_skipped_steps: int = _knob(
        25, "steps in a row with a loss that is not finite before stopping", "training", ge=1
    )
    log_every: int = _knob(10, "optimizer steps between logged steps", "training", ge=1)

    val_batch_size: int = _knob(16, "most validation images per rank and batch", "validation", ge=1)
    score_threshold: float = _knob(0.001, "least score of a detection", "validation", ge=0, lt=1)
    iou_threshold: float = _knob(0.6, "IoU of NMS", "validation", gt=0, le=1)
    max_detections: int = _knob(300, "most detections per image", "validation", ge=1)
    rect_val: bool = _knob(True, "pad validation images to their batch's shape only", "validation")

    hook: str | None = _knob(
        None, "your own hooks, as my_module:MyHook or my_file.py:MyHook, several with commas", "tracking"
    )
    writer: str | None = _knob(
        None, "your own writers of figures, as my_module:MyWriter, several with commas", "tracking"
    )
    wandb: Literal["disabled", "online", "offline"] = _knob("disabled", "Weights & Biases", "tracking")
    wandb_project: str = _knob("dsyolo", "project there", "tracking", min_length=1)
    wandb_name: str | None = _knob(None, "name there, by default that of the run", "tracking")

    recipe: Recipe = _knob(Recipe(), "", "recipe", learned=True)

    @field_validator("model")
    @classmethod
    def _can_be_built(cls, model: str) -> str:
        return check_model_name(model)

    @field_validator("imgsz")
    @classmethod
    def _fits_strides(cls, imgsz: int, info: ValidationInfo) -> int:
        model = info.data.get("model")
        if model is None or is_reference(model):  # refused itself; or checked with the network (registry.py)
            return imgsz
        stride = max_stride(model)
        if imgsz % stride or imgsz < 2 * stride:
            below = max(imgsz // stride, 2) * stride
            above = f" or {below + stride}" if below < imgsz else ""
            rule = f"must be a multiple of its largest stride, {stride}, and at least {2 * stride}"
            raise ValueError(f"{imgsz} given, but the images of {model} {rule}. Set it to {below}{above}.")
        return imgsz

    @field_validator("recompute")
    @classmethod
    def _can_be_read(cls, recompute: str) -> str:
        if recompute != "auto" and read_recompute(recompute) is None:
            raise ValueError(f"{recompute} given, but it must be {RECOMPUTE_RULE}. Leave it out for none.")
        return recompute

    @field_validator("sync_batchnorm")
    @classmethod
    def _has_statistics_to_share(cls, sync_batchnorm: bool, info: ValidationInfo) -> bool:
        if sync_batchnorm and info.data.get("freeze_batchnorm"):
            raise ValueError("true given, but --freeze_batchnorm leaves nothing to share. Leave one out.")
        return sync_batchnorm

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.project, self.name)

    def resumes(self) -> bool:
        """Whether the run begins at a checkpoint, as its folder is now."""
        return self.resume == "always" or (self.resume == "auto" and has_checkpoint(self.folder))

    def dump(self) -> dict[str, Any]:
        """Plain YAML types, recipe resolved; without `resume`, which tells of a start and not of the run."""
        return self.model_dump(exclude={"resume"})

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """What `dump` gave, from a YAML file. Raises UserError naming the file and every bad key."""
        problems: list[str] = []
        values = read_yaml(path, problems)
        recipe = values.pop("recipe", {})
        if isinstance(recipe, dict):
            values["recipe"] = validate(Recipe, recipe, "recipe.", unknown_in_recipe, problems) or Recipe()
        else:
            problems.append(f"recipe: {recipe!r} given, but it must be a mapping of keys to values.")
        run = validate(cls, values, "", _unknown_in_file, problems)
        if problems or run is None:
            raise UserError(f"{path} cannot be used", problems)
        return run


RUN_KEYS = frozenset(RunConfig.model_fields) - {"recipe"}
RECIPE_KEYS = frozenset(Recipe.model_fields)


def read_recompute(text: str) -> str | int | None:
    """`none`, `blocks`, or the bytes that a budget like `4.5GiB` names; None where it is none of these."""
    budget = re.fullmatch(r"(\d+(?:\.\d+)?) ?GiB", text)
    if budget and len(budget[1]) < 20:  # longer ones are no numbers of bytes
        return int(float(budget[1]) * 2**30) or None
    return text if text in ("none", "blocks") else None


def check_model_name(model: str) -> str:
    """Return `model`. Raises ValueError where it is neither a variant nor FILE.py:FUNCTION."""
    if model not in MODELS and not is_reference(model):
        rule = f"one of {', '.join(MODELS)}, or FILE.py:FUNCTION for your own"
        remedy = did_you_mean(model, MODELS) or "Leave it out for yolov5n."
        raise ValueError(f"{shortened(model)} given, but it must be {rule}. {remedy}")
    return model


def max_stride(model: str) -> int:
    """Pixels of the input per cell of the coarsest level: 32, or 64 for the P6 variants."""
    return 64 if model.endswith("6") else 32


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What changed between two configurations of what is learned, as lines `key: old -> new`.

    Paths of runs, workers, logging and validation may change at a resume: they are not named.
    """
    pairs = [(RunConfig, old, new), (Recipe, old.recipe, new.recipe)]
    return [
        f"{key}: {getattr(a, key)} -> {getattr(b, key)}"
        for cls, a, b in pairs
        for key, field in cls.model_fields.items()
        if extra_of(field, "learned") and key != "recipe" and getattr(a, key) != getattr(b, key)
    ]


def preset(name: str) -> Recipe:
    """The packaged recipe `low`, `med` or `high`."""
    assert name in PRESETS, name
    text = resources.files("dsyolo").joinpath("config", "presets", f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe(**yaml.safe_load(text))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` can go on."""
    return any(folder.glob("checkpoints/step_*")) and (folder / "config.yaml").is_file()


def read_yaml(path: str | Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file. A file that is none is a problem, and gives an empty one."""
    try:
        values = parse_yaml(read_text(path))
    except BadYamlError as error:
        problems.append(str(error))
        return {}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}.")
        return {}
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append("must be a mapping of keys to values, as in `mosaic: 1.0`.")
        return {}
    return {str(key): value for key, value in values.items()}


# ---- keys that are nobody's, or somebody else's


def _unknown(key: str, known: Iterable[str], prefix: str = "") -> str:
    owner = JSON_KNOBS.get(key)
    if owner:
        return f"{prefix}{key}: the DeepSpeed JSON owns it. Set {owner} there."
    hint = did_you_mean(key, known, prefix) or ("See --help." if prefix else "Leave it out.")
    return f"{prefix}{key}: unknown {'option' if prefix else 'key'}. {hint}"


def unknown_option(key: str) -> str:
    """What to tell of an option that there is not."""
    return _unknown(key, RUN_KEYS | RECIPE_KEYS, "--")


def _unknown_in_file(key: str) -> str:
    return _unknown(key, RUN_KEYS)


def unknown_in_recipe(key: str) -> str:
    """What to tell of a key that a recipe may not have."""
    if key in RUN_KEYS:
        return f"{key}: not part of the recipe. Give it on the command line: --{key}."
    return _unknown(key, RECIPE_KEYS)
