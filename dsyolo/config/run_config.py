"""The run configuration: what is learned, and where it goes. cli_args.py builds its command line from its fields.

How it runs (batch sizes, precision, ZeRO, optimizer and its lr) is the DeepSpeed JSON's: config/deepspeed/.
A knob has one owner; `JSON_KNOBS` names the JSON's key for those that people look for here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import BadYamlError, parse_yaml, read_text, shortened
from dsyolo.base.user_code import is_reference
from dsyolo.config.json_remedy import JSON_OWNS
from dsyolo.config.messages import did_you_mean, validate
from dsyolo.config.recipe import DEFAULT_RECIPE, RECIPE_KEYS, Recipe, extra_of, knob

MODELS = tuple(f"yolov5{size}{levels}" for levels in ("", "6") for size in "nsmlx")
RECOMPUTE_RULE = '"none", "blocks" or a budget in GiB like "4.5GiB"'
AUTO = "auto"  # --deepspeed_config: planned for the machine (planner/auto.py); in the JSON: this value is

# Keys of the DeepSpeed JSON, and the names that other trainers and YOLOv5's hyper-parameters have for them.
_JSON_NAMES = {
    "bf16 or torch_autocast": ("bf16",),
    "fp16 or torch_autocast": ("fp16",),
    "gradient_accumulation_steps": ("accumulate", "gradient_accumulation_steps"),
    "gradient_clipping": ("clip", "gradient_clipping"),
    "optimizer.params.lr": ("lr", "lr0"),
    "optimizer.params.momentum": ("momentum",),
    "optimizer.params.nesterov": ("nesterov",),
    "optimizer.params.weight_decay": ("weight_decay",),
    "optimizer.type": ("adam", "optimizer"),
    "pipeline.stages": ("stages",),
    "train_batch_size": ("batch_size", "train_batch_size"),
    "train_micro_batch_size_per_gpu": ("micro_batch_size", "train_micro_batch_size_per_gpu"),
    "zero_optimization.stage": ("zero_stage",),
}
JSON_KNOBS = {name: key for key, names in _JSON_NAMES.items() for name in names}

# Names that options had in the config.yaml of older runs.
RENAMED = {
    "meet_timeout_s": "rendezvous_timeout_s",
    "memory_account": "memory_profile",
    "time_account": "time_profile",
}

_run = partial(knob, group="run")
_machine = partial(knob, group="machine")
_training = partial(knob, group="training")
_validation = partial(knob, group="validation")
_tracking = partial(knob, group="tracking")


class RunConfig(BaseModel):
    """The settings of a run. None: derived from the machine or from another field when the run starts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    deepspeed_config: str = _run(
        AUTO, "DeepSpeed JSON, or the name of a file in ds_configs/: how the training runs; auto: planned"
    )
    batch: int | None = _run(
        None,
        "images of a micro-batch on each GPU, before the JSON's; -1: planned",
        unset="the JSON's",
        ge=-1,
        le=2**16,
    )
    global_batch: int | None = _run(
        None,
        "images in an optimizer step, all GPUs together, before the JSON's",
        alone="batch",
        unset="the JSON's",
        ge=1,
    )
    data: str = _run(..., "data set's YAML file", learned=True)
    model: str = _run("yolov5n", f"{', '.join(MODELS)}, or your own: FILE.py:FUNCTION", learned=True)
    weights: str | None = _run(None, "weights to start from", learned=True)
    transfer_classes: bool = _run(False, "keep the weights' last layer for shared classes", learned=True)
    imgsz: int = _run(640, "side of the training images in pixels", learned=True, le=8192)
    epochs: int = _run(300, "epochs", learned=True, ge=1)
    seed: int = _run(0, "random seed", learned=True, ge=0, lt=2**63)
    hyp: str = _run("low", "recipe: low, med, high or a YAML file")
    resume: Literal["never", "always", "auto"] = _run(
        "never",
        "resume PROJECT/NAME: never, always, or auto (resume if there is a checkpoint, else start); or the path of a run",
        alone="always",
    )
    project: str = _run("runs", "folder of runs", min_length=1)
    name: str = _run("train", "folder of this run inside the project", min_length=1)
    exist_ok: bool = _run(False, "start afresh in the folder of another run, whose files are moved aside")
    device: Literal["auto", "cpu"] = _run("auto", "auto: the GPUs if there are any; cpu")

    workers: int | None = _machine(
        None, "loader processes per rank; auto: by the number of cores", unset="auto", ge=0, le=1024
    )
    threads: int | None = _machine(None, "threads per rank; auto: by the number of cores", unset="auto", ge=1)
    recompute: str = _machine(
        "auto",
        "activation checkpointing: none, blocks, as few blocks as fit a budget like 4.5GiB; auto: as in the JSON",
    )
    halve_micro_batch: bool = _machine(
        False,
        "halve the JSON's micro-batch and double its accumulation; a run that ran out of memory sets it",
    )
    hang_timeout_s: float = _machine(
        600, "seconds without progress after which all ranks end and the late one is named", ge=5
    )
    rendezvous_timeout_s: float = _machine(300, "rendezvous timeout in seconds", ge=5)
    memory_profile: Literal["start", "epochs", "off"] = _machine("start", "when to measure memory by term")
    time_profile: Literal["epochs", "steps", "off"] = _machine(
        "epochs", "log the time profile: epochs, steps (also write each step to steps.json), off"
    )
    cache: Literal["none", "ram"] = _machine("none", "where to keep decoded images", alone="ram")

    ema: bool = _training(True, "average the weights", learned=True)
    ema_decay: float = _training(0.9999, "decay of the average", learned=True, gt=0, lt=1)
    ema_tau: float = _training(2000, "time constant of the decay's rise, in updates", learned=True, gt=0)
    freeze_batchnorm: bool = _training(False, "keep BatchNorm's statistics as they are", learned=True)
    sync_batchnorm: bool = _training(False, "BatchNorm over the images of all ranks", learned=True)
    patience: int = _training(100, "epochs without a better fitness before stopping; 0: never stop", ge=0)
    val_every: int = _training(1, "epochs between validations", ge=1)
    save_every: int = _training(1, "epochs between checkpoints", ge=1)
    keep_checkpoints: int = _training(2, "newest checkpoints kept, beside the best one", ge=1)
    max_skipped_steps: int = _training(25, "consecutive steps with a non-finite loss before stopping", ge=1)
    log_every: int = _training(10, "optimizer steps between logged steps", ge=1)

    val_batch_size: int = _validation(16, "largest validation batch of a rank, in images", ge=1)
    score_threshold: float = _validation(0.001, "minimum score of a detection", ge=0, lt=1)
    iou_threshold: float = _validation(0.6, "IoU threshold of NMS", gt=0, le=1)
    max_detections: int = _validation(300, "maximum detections per image", ge=1)
    rect_val: bool = _validation(True, "pad validation images to the shape of their batch only")

    hook: str | None = _tracking(
        None, "your own hooks, as my_module:MyHook or my_file.py:MyHook, separated by commas"
    )
    writer: str | None = _tracking(
        None,
        "your own writers of figures, as my_module:MyWriter or my_file.py:MyWriter, separated by commas",
    )
    wandb: Literal["disabled", "online", "offline"] = _tracking("disabled", "Weights & Biases")
    wandb_project: str = _tracking("dsyolo", "W&B project", min_length=1)
    wandb_name: str | None = _tracking(None, "W&B name of the run", unset="--name")

    recipe: Recipe = knob(DEFAULT_RECIPE, "", "recipe", learned=True)

    @field_validator(
        *("deepspeed_config", "data", "model", "weights", "hyp", "project", "name", "hook", "writer"),
        mode="wrap",
    )
    @classmethod
    def _takes_any_path(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """Take a path whose bytes are no text in this locale, too: pydantic refuses the surrogates in it."""
        return value if isinstance(value, str) and value and not value.isascii() else handler(value)

    @field_validator("model")
    @classmethod
    def _can_be_built(cls, model: str) -> str:
        return check_model_name(model)

    @field_validator("batch")
    @classmethod
    def _is_a_number_of_images(cls, batch: int | None) -> int | None:
        if batch == 0:
            raise ValueError(
                "0 given, but a micro-batch has images. Set it to 1, or to -1 to have it planned."
            )
        return batch

    @field_validator("imgsz")
    @classmethod
    def _fits_strides(cls, imgsz: int, info: ValidationInfo) -> int:
        model = info.data.get("model")
        if model is None or is_reference(model):  # refused itself; or `resolve` asks the network
            return imgsz
        if fault := image_size_fault(imgsz, model, 64 if model.endswith("6") else 32):
            raise ValueError(fault)
        return imgsz

    @field_validator("recompute")
    @classmethod
    def _can_be_read(cls, recompute: str) -> str:
        if recompute != "auto" and read_recompute(recompute) is None:
            raise ValueError(f"{recompute} given, but it must be {RECOMPUTE_RULE}. Or leave it to the JSON.")
        return recompute

    @field_validator("sync_batchnorm")
    @classmethod
    def _has_statistics_to_share(cls, sync_batchnorm: bool, info: ValidationInfo) -> bool:
        if sync_batchnorm and info.data.get("freeze_batchnorm"):
            raise ValueError("true given, but --freeze_batchnorm leaves nothing to share. Leave one out.")
        return sync_batchnorm

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return Path(self.project, self.name)

    def dump(self) -> dict[str, Any]:
        """Return plain YAML types with the recipe resolved, without what belongs to a start and not to the run."""
        return self.model_dump(exclude=set(OF_A_START))

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read what `dump` gave from a YAML file. Raises UserError naming the file and every bad key."""
        problems: list[str] = []
        values = {RENAMED.get(key, key): value for key, value in read_yaml(path, problems).items()}
        values.pop("optimizer", None)  # a record of what the DeepSpeed JSON asked for
        recipe = values.pop("recipe", {})
        if isinstance(recipe, dict):
            values["recipe"] = validate(Recipe, recipe, "recipe.", unknown_in_recipe, problems) or Recipe()
        else:
            problems.append(f"recipe: {recipe!r} given, but it must be a mapping of keys to values.")
        run = validate(cls, values, "", partial(_unknown, known=RUN_KEYS), problems)
        if problems or run is None:
            raise UserError(f"{path} cannot be used", problems)
        return run


RUN_KEYS = frozenset(RunConfig.model_fields) - {"recipe"}
OF_A_START = ("resume", "exist_ok", "device")  # not kept in config.yaml


def read_recompute(text: str) -> str | int | None:
    """Return `none`, `blocks`, or the bytes of a budget like `4.5GiB`; None where it is none of these."""
    budget = re.fullmatch(r"(\d+(?:\.\d+)?) ?GiB", text)
    if budget and len(budget[1]) < 20:  # longer ones are no numbers of bytes
        return int(float(budget[1]) * 2**30) or None
    return text if text in ("none", "blocks") else None


def budget_gib(size: int) -> str:
    """Return bytes as `read_recompute` reads them, rounded up."""
    return f"{math.ceil(size / 2**30 * 1000) / 1000:.3f}GiB"


def check_model_name(model: str) -> str:
    """Return `model`. Raises ValueError where it is neither a variant nor FILE.py:FUNCTION."""
    if model not in MODELS and not is_reference(model):
        rule = f"one of {', '.join(MODELS)}, or FILE.py:FUNCTION for your own"
        remedy = did_you_mean(model, MODELS) or "Leave it out for yolov5n."
        raise ValueError(f"{shortened(model)} given, but it must be {rule}. {remedy}")
    return model


def image_size_fault(size_px: int, model: str, multiple: int, times: int = 2) -> str | None:
    """Return why a size is not a multiple of `multiple`, or is less than `times` of it; None for a size that fits."""
    if size_px % multiple == 0 and size_px >= times * multiple:
        return None
    below = max(size_px // multiple, times) * multiple
    above = f" or {below + multiple}" if below < size_px else ""
    rule = f"must be a multiple of {multiple}, and at least {times * multiple}"
    return f"{size_px} given, but the images of {model} {rule}. Set it to {below}{above}."


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the differences in what is learned, as lines `key: old -> new`.

    Paths of runs, workers, logging and validation may change at a resume, and are left out.
    """

    def learned(run: RunConfig) -> dict[str, Any]:
        parts = [(run, RunConfig.model_fields), (run.recipe, Recipe.model_fields)]
        return {
            key: getattr(part, key)
            for part, fields in parts
            for key, field in fields.items()
            if extra_of(field, "learned") and key != "recipe"
        }

    before, now = learned(old), learned(new)
    return [f"{key}: {value} -> {now[key]}" for key, value in before.items() if now[key] != value]


def read_yaml(path: str | Path, problems: list[str]) -> dict[str, Any]:
    """Return the mapping in a YAML file. Any other file is a problem, and gives an empty mapping."""
    values: Any = None
    try:
        values = parse_yaml(read_text(path))
    except BadYamlError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"cannot be read: {error.strerror}.")
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append("must be a mapping of keys to values, as in `mosaic: 1.0`.")
        return {}
    return {str(key): value for key, value in values.items()}


# ---- unknown keys, and keys of the DeepSpeed JSON


def _unknown(key: str, known: Iterable[str], prefix: str = "") -> str:
    owner = JSON_KNOBS.get(key)
    if owner:
        return f"{prefix}{key}: {JSON_OWNS} Set {owner} there."
    hint = did_you_mean(key, known, prefix) or ("See --help." if prefix else "Leave it out.")
    return f"{prefix}{key}: unknown {'option' if prefix else 'key'}. {hint}"


unknown_option = partial(_unknown, known=RUN_KEYS | RECIPE_KEYS, prefix="--")


def unknown_in_recipe(key: str) -> str:
    """Return the problem of a key that a recipe may not have."""
    if key in ("iou_t", "anchors"):
        return f"{key}: it is not used here, nor its default in YOLOv5. Leave it out."
    if key in RUN_KEYS:
        return f"{key}: not part of the recipe. Give it on the command line: --{key}."
    return _unknown(key, RECIPE_KEYS)
