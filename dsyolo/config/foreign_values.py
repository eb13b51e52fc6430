"""Reads the values of foreign options: what is taken for a value, or the problem as text, or None to go on."""

import re
from pathlib import Path

from dsyolo.base.user_code import is_reference
from dsyolo.config.foreign_options import SWITCH, Taken
from dsyolo.config.json_remedy import JSON_OWNS
from dsyolo.config.run_config import MODELS

PAGE = "See docs/from_yolov5.md."
NO_EXPORT = f"there is no export: weights are safetensors (RUN/weights/best.safetensors). {PAGE}"
NO_VIDEO = (
    f"no videos, cameras and streams are read: extract frames, and give their folder to dsyolo detect. {PAGE}"
)
RELEASES = "github.com/ultralytics/yolov5/releases"
_VARIANT = re.compile(r"(?:.*/)?(yolov5[nsmlx]6?)u?(\.yaml|\.pt|\.pth)?")
_SCRATCH = re.compile(r"(?:.*/)?hyp\.scratch-(low|med|high)(?:\.yaml)?")


def release_name(weights: str) -> str | None:
    """Return the variant whose released weights a path names, as yolov5s for yolov5s.pt and yolov5s; None for other paths."""
    match = _VARIANT.fullmatch(weights)
    return match[1] if match and match[2] in (".pt", ".pth", None) else None


def missing_release(weights: str) -> str:
    """Return the remedy for weights of another program that are not there."""
    is_release = release_name(weights) is not None
    name = Path(weights).name if Path(weights).suffix else f"{Path(weights).name}.pt"
    place = f"get {name} from {RELEASES}, v6.0 to v7.0" if is_release else "check the path"
    return f"Nothing is downloaded: {place}. Or leave it out to train from scratch."


def read_model(text: str) -> Taken | str | None:
    """Take a variant's YAML file for its name, and a file of weights for these."""
    if text.endswith(".safetensors") or (text.endswith((".pt", ".pth")) and Path(text).is_file()):
        return Taken((f"--weights={text}",))
    match = _VARIANT.fullmatch(text)
    if match and match[1] in MODELS and match[2] != ".pt" and not Path(text).is_file():
        return Taken((f"--model={match[1]}",))
    if match and match[2]:
        scratch = f"--model {match[1]} trains from scratch"
        return f"{scratch}, and --weights {text} starts from weights. {missing_release(text)}"
    if re.fullmatch(r"(?:.*/)?(yolo|rtdetr|sam).*\.(pt|yaml)", text, re.IGNORECASE):
        return f"{text} given, but only YOLOv5's networks are here: --model {', '.join(MODELS)}."
    if text.endswith((".pt", ".pth")):
        return f"{text} given, but there is no such file. Give weights that are there by --weights FILE."
    return None


def read_cfg(text: str) -> Taken | str | None:
    """Read `--cfg`: a variant's YAML file is its name."""
    found = read_model(text)
    if isinstance(found, Taken):
        return found
    return Taken() if not text else None


def read_weights_to_use(text: str) -> str | None:
    """Answer released weights that are not there, for val and detect."""
    variant = None if Path(text).exists() else release_name(text)
    if variant is None:
        return None
    given = f"get {variant}.pt from {RELEASES}, v6.0 to v7.0"
    return f"{text} does not exist, and nothing is downloaded: {given}, or give those of a run. {PAGE}"


def read_model_to_use(text: str) -> Taken | str | None:
    """Take `model=` of val and detect, which is a weights file there, unless it is FILE.py:FUNCTION, as in a training."""
    if is_reference(text):
        return None
    return read_weights_to_use(text) or Taken((f"--weights={text}",))


def read_hyp(text: str) -> Taken | str | None:
    """Read the name of one of YOLOv5's recipes: three of them are presets."""
    if Path(text).is_file():
        return None
    if match := _SCRATCH.fullmatch(text):
        return Taken((f"--hyp={match[1]}",))
    if re.fullmatch(r"(?:.*/)?hyp\.[\w-]+\.yaml", text):
        return f"{text} does not exist; the presets are --hyp low, --hyp med and --hyp high. Give one, or a file that is there."
    return None


def read_save_period(text: str) -> Taken | None:
    """Read `--save-period`; below 1 it is off."""
    if re.fullmatch(r"-\d+|0", text):
        return Taken()  # YOLOv5's default: only best and last
    return Taken((f"--save_every={text}",), "read as --save_every; the newest --keep_checkpoints (2) stay")


def read_optimizer(text: str) -> str | None:
    """Answer `--optimizer` with the key of the JSON and its value."""
    kinds = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    if (kind := kinds.get(text.lower())) is None:
        return f'{text} given, but {JSON_OWNS} Set optimizer.type to "SGD", "Adam" or "AdamW" there.'
    ready = " Without it SGD runs." if kind == "SGD" else " Or give --deepspeed_config adamw, which is AdamW."
    return f'{JSON_OWNS} Set optimizer.type to "{kind}" there.{ready}'


def read_device(text: str) -> Taken | str | None:
    """Read `--device` of a training: GPUs are chosen before it starts."""
    text = text.strip().lower()
    if text in ("cpu", "auto"):
        return None
    if text in ("", "none"):
        return Taken()
    if (numbers := text.removeprefix("cuda:")) and re.fullmatch(r"\d+(,\s*\d+)*", numbers):
        several = f"deepspeed --include localhost:{numbers} dsyolo/train.py"
        if "," in numbers:
            return f"{text} given, but the launcher chooses GPUs: {several}."
        return f"{text} given, but GPUs are chosen before the start: CUDA_VISIBLE_DEVICES={numbers} in front of the command, or {several}."
    return f"{text} given, but it must be cpu or auto. DS_ACCELERATOR names other devices, and CUDA_VISIBLE_DEVICES GPUs. {PAGE}"


def read_device_here(text: str) -> Taken | str | None:
    """Read `--device` of a command that uses one device."""
    found = read_device(text)
    if isinstance(found, str) and "CUDA_VISIBLE_DEVICES=" in found:
        return found.partition(", or deepspeed")[0] + ", or --device cpu."
    return found


def read_sizes(text: str) -> Taken | str | None:
    """Read an image size: two equal numbers are one; images of other shapes are fitted into a square."""
    sizes = [part for part in re.split(r"[\s,x]+", text.strip("[]()").lower()) if part]
    if len(sizes) < 2 or not all(part.isdecimal() for part in sizes):
        return None
    if len({int(part) for part in sizes}) == 1:
        return Taken((f"--imgsz={int(sizes[0])}",))
    largest = max(int(part) for part in sizes)
    return f"{text} given, but images are square: --imgsz {largest}, the longer side."


def read_batch_share(text: str) -> str | None:
    """Answer a batch that is a share of the memory."""
    if re.fullmatch(r"0?\.\d+", text):
        return f"{text} given, but a share of the memory cannot be chosen. Give --batch -1, which plans for all of it but 5 %."
    return None


def read_pretrained(text: str) -> Taken | str:
    """Read `pretrained=`: a file, or none."""
    if SWITCH.get(text.lower()):
        return Taken((), "without --weights the training starts from scratch: nothing is downloaded")
    if text.lower() in ("none", "") or text.lower() in SWITCH:
        return Taken()
    if text.endswith((".safetensors", ".pt", ".pth")):
        return Taken((f"--weights={text}",))
    return f"{text} given, but files go by --weights FILE. {missing_release('yolov5s.pt')}"
