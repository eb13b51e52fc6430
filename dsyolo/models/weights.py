"""Weights files: safetensors with the metadata to rebuild the network, and the files of YOLOv5 itself.

Neither kind runs code: safetensors hold none, and that of a pickled file is never run (yolov5_checkpoint.py).
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsyolo.base.atomic_file import replacing
from dsyolo.base.errors import UserError
from dsyolo.base.plain_pickle import PickleRefusedError
from dsyolo.base.safe_io import pickled, shortened
from dsyolo.base.tensor_file import open_tensors
from dsyolo.base.user_code import is_reference
from dsyolo.models.class_transfer import head_of_classes
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.registry import build_model, is_known, saved_name
from dsyolo.models.weights_info import GivenWeights, WeightsInfo, from_yolov5, unusable
from dsyolo.models.yolov5 import VARIANTS, level_strides
from dsyolo.models.yolov5_checkpoint import LICENCE, read_checkpoint, recognised

METADATA_KEY = "dsyolo"
VARIANCE = ".running_var"
# Relative errors that the types leave, some times as much: of 24, 11 and 8 bits. Counts are no anchors.
ANCHOR_ROUNDING = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
    torch.int64: 0,
}
MOST_BYTES = 4 << 30
DTYPES = ("F32", "F16", "BF16", "F64", "I64")  # the last: counts of batches, in YOLOv5's own files
PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
MOST_ANCHOR_PX = 1 << 20
MOST_NAMED = 5


def save_weights(path: Path, state_dict: Mapping[str, torch.Tensor], info: WeightsInfo) -> None:
    """Write the tensors as they are, under the network's own names. A rename puts the file in place: complete or not at all."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state_dict.items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata={METADATA_KEY: info.model_dump_json()})
        # safetensors creates files that only the owner may read
        part.chmod(path.parent.stat().st_mode & 0o666)


def read_weights(path: Path) -> GivenWeights:
    """Read a weights file; return tensors under our names, and what is known of them, if anything is.

    Safetensors of dsyolo or with YOLOv5's names, or a file that YOLOv5 pickled, whose code is not run.

    Raises:
        UserError: the file is missing, damaged, of another network, or contains NaN or infinity.
    """
    _refuse_file(path)
    tensors, info = _read_pickled(path) if is_pickled(path) else _read_safetensors(path)
    if fault := _contradiction(tensors, info):
        raise unusable(path, f"{fault}. Copy the file again, or use another.")
    return tensors, info


def _read_pickled(path: Path) -> GivenWeights:
    if not zipfile.is_zipfile(path):
        rule = "it is no complete file of torch.save (of torch 1.6 or later), and to read another pickle may run code"
        remedy = (
            "Copy it again; or if you trust it, convert it once in the environment that wrote it: "
            "safetensors.torch.save_file(model.float().state_dict(), 'weights.safetensors')"
        )
        raise unusable(path, f"{rule}. {remedy}")
    try:
        found = read_checkpoint(path)
        _refuse_damage(path, found.tensors)
        return recognised(found)
    except PickleRefusedError as error:
        raise unusable(path, f"{error}. No code of it was run.") from None


def _read_safetensors(path: Path) -> GivenWeights:
    try:
        with open_tensors(path) as file:
            names = list(file.keys())
            types = {name: file.get_slice(name).get_dtype() for name in names}
            if other := [name for name, type_ in types.items() if type_ not in DTYPES]:
                rule = (
                    f"{other[0]} is of type {types[other[0]]}, but weights must be one of {', '.join(DTYPES)}"
                )
                raise unusable(path, f"{rule}. Save them in fp32.")
            tensors = {name: file.get_tensor(name) for name in names}
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise unusable(
            path, f"it is not a complete safetensors file ({error}). Copy the file again, or use another."
        ) from None
    _refuse_damage(path, tensors)
    try:
        if all(name.startswith("model.") for name in tensors):
            tensors = from_yolov5(tensors)
        return tensors, None if text is None else WeightsInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        what = shortened(
            ": ".join([".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")])
        )
        raise unusable(
            path, f"its metadata is damaged ({what.removeprefix(': ')}). Copy the file again, or use another."
        ) from None
    except ValueError as error:
        raise unusable(path, f"{error}.") from None


def _refuse_damage(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    negative = [name for name, one in tensors.items() if name.endswith(VARIANCE) and bool((one < 0).any())]
    if negative:
        what = f"{negative[0]} has a value below 0, and a variance has none"
        raise unusable(path, f"{what}. Copy the file again, or use another.")
    damaged = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if damaged:
        what = f"{len(damaged)} of its {len(tensors)} tensors hold NaN or infinity ({damaged[0]} ...)"
        remedy = "The training that wrote it diverged: use earlier weights, or train with a lower lr"
        raise unusable(path, f"{what}. {remedy}.")


def _contradiction(tensors: Mapping[str, torch.Tensor], info: WeightsInfo | None) -> str | None:
    """Return what in a file cannot be, or contradicts its metadata; None where nothing does."""
    anchors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == "anchors"}
    if impossible := [name for name, tensor in anchors.items() if not bool((tensor > 0).all())]:
        return f"{impossible[0]} has a value that is not above 0, and anchors are sizes"
    if info is None:
        return None
    return _anchor_fault(anchors, info) or (_head_fault(tensors, info) if is_known(info.variant) else None)


def _head_fault(tensors: Mapping[str, torch.Tensor], info: WeightsInfo) -> str | None:
    """Return how the head of a YOLOv5 differs from the metadata of the same file; None where they agree."""
    if "detect.anchors" not in tensors:
        return "its metadata has anchors, and no tensor detect.anchors is there"
    outputs = len(info.anchors_px[0]) * (5 + len(info.names))
    for name, tensor in tensors.items():
        if name.startswith("detect.m.") and len(tensor) != outputs:
            return f"its metadata names {len(info.names)} classes, which are {outputs} outputs, and {name} has {len(tensor)}"
    return None


def _anchor_fault(anchors: Mapping[str, torch.Tensor], info: WeightsInfo) -> str | None:
    """Return how the metadata's anchors differ from the tensor of the same file; None where they agree.

    The tensor is in cells of its level. So the two differ by one factor a level, its stride, which is a whole number.
    """
    levels = info.anchors_px
    sides = [side for level in levels for pair in level for side in pair]
    if not sides or len({len(level) for level in levels}) > 1:
        return "its metadata is damaged (anchors_px: every level must have as many anchors)"
    if not all(0 < side < MOST_ANCHOR_PX for side in sides):
        return "its metadata is damaged (anchors_px: the sides of an anchor must be above 0)"
    for name, tensor in anchors.items():
        if tensor.shape != (len(levels), len(levels[0]), 2):
            return f"its metadata has {len(levels)} levels of {len(levels[0])} anchors, and {name} is {tuple(tensor.shape)}"
        strides = torch.tensor(levels, dtype=torch.float64) / tensor.double()
        expected = strides.mean((1, 2), keepdim=True).round()
        if is_known(info.variant):
            expected = torch.tensor(level_strides(info.variant), dtype=torch.float64).view(-1, 1, 1)
        if not ((strides - expected).abs() <= expected * ANCHOR_ROUNDING[tensor.dtype]).all():
            return f"its metadata has other anchors than {name}"
    return None


def _refuse_file(path: Path) -> None:
    if path.is_dir():
        raise unusable(path, "it is a folder. Give a .safetensors file: RUN/weights/best.safetensors.")
    if not path.is_file():
        raise unusable(path, "there is no such file, and nothing is downloaded. Check the path.")
    if path.stat().st_size > MOST_BYTES:
        rule = f"it has {path.stat().st_size / 2**30:.1f} GiB, and a detector's weights at most {MOST_BYTES / 2**30:.0f}"
        raise unusable(path, f"{rule}. Give a file that holds the weights alone.")


def is_pickled(path: Path) -> bool:
    """Return whether a file is pickled, as YOLOv5's own are, by its suffix or content."""
    return path.suffix in PICKLED_SUFFIXES or pickled(path) is not None


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor on the host has neither NaN nor infinity."""
    # Ten times as fast as isfinite().all(): 0.4 s for the largest variant. aminmax passes NaN on.
    return not tensor.numel() or bool(torch.stack(tensor.float().aminmax()).isfinite().all())


def load_into(
    network: DetectionNetwork,
    path: Path,
    read: GivenWeights | None = None,
    names: Sequence[str] = (),
) -> str:
    """Load into `network` the tensors of `path` whose names and shapes fit; return a line for the log.

    A detector of other classes fits in all but its last layer, which is what fine-tuning wants. A network of the
    user's own takes what it shares with any other. `read` is what `read_weights` returned, if it was called already.
    `names` of the network's classes let those that the file has too keep their part of the last layer.

    Raises:
        UserError: as `read_weights`; or the file is of another variant, or too few tensors fit.
    """
    tensors, info = read or read_weights(path)
    is_own = not is_known(network.variant)
    if info is not None and info.variant != network.variant and not is_own:
        rule = f"it is of {info.variant}, but this run trains {network.variant}"
        raise unusable(path, f"{rule}. Give --model {info.variant}, or other weights.")
    own = network.state_dict()
    fits = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    if not fits or (2 * len(fits) < len(own) and not is_own):
        rule = f"only {len(fits)} of {len(own)} tensors of {network.variant} have a match by name and shape"
        remedy = (
            "Name the nodes as in that file, or leave --weights out"
            if is_own
            else f"Give weights of {network.variant}"
        )
        raise unusable(path, f"{rule}. {remedy}.")
    if names:
        fits |= _classes_kept(network, path, tensors, info, names)
    network.load_state_dict(fits, strict=False)
    line = f"{path}: {len(fits)} of {len(own)} tensors loaded"
    line += f" ({LICENCE})" if path.suffix in PICKLED_SUFFIXES else ""
    if names and info:
        line += f"; last layer kept for {len(set(names) & set(info.names))} of {len(names)} classes"
    fresh = dict.fromkeys(name.partition(".")[0] for name in own if name not in fits)
    if fresh:
        line += f"; random values for {', '.join(fresh)}"
    if fresh.keys() - {network.head} and not is_own:
        line += f". These are not the weights of a {network.variant}"
    return line


def _classes_kept(
    network: DetectionNetwork,
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    info: WeightsInfo | None,
    names: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Return the last layer with the rows of the classes that the file has under the same names."""
    given_names = info.names if info else ()
    if not set(names) & set(given_names):
        known = ", ".join(given_names[:MOST_NAMED]) or "none"
        rule = (
            f"none of the classes to train is in it, and --transfer_classes was given (its classes: {known})"
        )
        raise unusable(path, f"{shortened(rule)}. Leave --transfer_classes out.")
    convolutions = (f"{network.head}.m.",)
    fresh = {name: one for name, one in network.state_dict().items() if name.startswith(convolutions)}
    try:
        return head_of_classes(fresh, tensors, names, given_names)
    except ValueError as error:
        raise unusable(path, f"{error}, and --transfer_classes was given. Leave it out.") from None


def rebuild(path: Path, model: str | None = None) -> tuple[DetectionNetwork, WeightsInfo]:
    """Return the network in eval mode that a file of `save_weights` describes, and the description.

    Args:
        model: what the user gave as --model. A file's own description never makes code run: weights of a user's
            network need it.

    Raises:
        UserError: as `read_weights`; no metadata; tensors that do not fit it; or `model` is missing, or another one.
    """
    tensors, info = read_weights(path)
    if info is None:
        remedy = "Give a file that dsyolo wrote, such as that of a run started with --weights"
        raise unusable(path, f"it has no metadata on variant and classes. {remedy}.")
    model = _model_of(info.variant, model, path)
    try:
        with torch.device("meta"):  # before allocating memory for as many classes as the file claims
            expected = build_model(model, len(info.names)).state_dict()
        for name, tensor in tensors.items():
            if name in expected and tensor.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} and not {tuple(expected[name].shape)}")
        network = build_model(model, len(info.names))
        network.load_state_dict(tensors)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        remedy = f"Give the --model {info.variant} it was trained with"
        if is_known(model):
            remedy = "Copy the file again, or use another"
        raise unusable(path, f"its tensors do not fit its metadata ({error}). {remedy}.") from None
    return network.eval(), info


def _model_of(variant: str, model: str | None, path: Path) -> str:
    """Return the model to build for weights of `variant`: a known variant, or else what the user gave."""
    name = shortened(variant)
    if not is_known(variant) and not is_reference(variant):
        raise unusable(path, f"its metadata says {name}, but the variants are {', '.join(VARIANTS)}.")
    if model is None and not is_known(variant):
        rule = f"it is of {name}, a user's own network, and a weights file holds no code"
        raise unusable(path, f"{rule}. Name the file that builds it: --model {name}.")
    if model is not None and saved_name(model) != variant:
        raise unusable(
            path, f"it is of {name}, but --model {model} was given. Give its own --model, or other weights."
        )
    return model or variant


def describe(network: DetectionNetwork, names: Sequence[str], image_size_px: int) -> WeightsInfo:
    """Return the metadata to save with the tensors of `network`."""
    strides = torch.tensor(network.strides, dtype=torch.float32).view(-1, 1, 1)
    anchors_px: Any = (network.anchors.detach().float().cpu() * strides).tolist()
    return WeightsInfo(
        variant=network.variant, names=tuple(names), image_size_px=image_size_px, anchors_px=anchors_px
    )
