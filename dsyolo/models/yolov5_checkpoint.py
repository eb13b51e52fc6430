"""Finds the weights in a file that YOLOv5 pickled, and what they are of. No code of the file runs.

Source: the layout of such a file as its users know it: a dictionary with `ema` and `model`, each a whole module in fp16,
beside optimizer and settings; a module keeps `_parameters`, `_buffers` and `_modules` by name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from dsyolo.base.plain_pickle import Inert, PickleRefusedError
from dsyolo.models.registry import meta_network
from dsyolo.models.torch_file import LazyTensor, TorchFile
from dsyolo.models.weights_info import GivenWeights, WeightsInfo, from_yolov5
from dsyolo.models.yolov5 import DEPTH_WIDTH, P5, STEM_CHANNELS, VARIANTS, level_strides

MOST_DEPTH, MOST_TENSORS = 40, 20_000  # of modules within each other; x6 has 9 and 1,100
ANCHORS_A_LEVEL = 3
LICENCE = "weights that Ultralytics publishes for YOLOv5 are under AGPL-3.0, whatever program reads them"
_DROPPED = "anchor_grid"  # a buffer of v5.0: the anchors once more, in pixels
_FOCUS = "model.0.conv.conv.weight"
_PREFIX = "module."  # of a network that was saved within DistributedDataParallel


class Found(NamedTuple):
    """The weights of a pickled file under YOLOv5's names, in fp32, and what the file says of them."""

    tensors: dict[str, torch.Tensor]
    class_names: tuple[str, ...] | None
    image_size_px: int | None


def read_checkpoint(path: Path) -> Found:
    """Read a file of `torch.save` that holds a YOLOv5: a training's checkpoint, a module, or a plain state dict.

    The averaged weights (`ema`) come before the trained ones (`model`).

    Raises:
        PickleRefusedError: it is damaged, holds code or another network, or no weights.
    """
    with TorchFile(path) as file:
        content = file.content()
        module = _weights_in(content)
        lazy = dict(_flattened(module) if isinstance(module, Inert) else _tensors(module))
        _refuse_others(lazy)
        tensors = {name: _full_precision(one.read()) for name, one in lazy.items()}
    state = module.state if isinstance(module, Inert) and isinstance(module.state, dict) else {}
    return Found(tensors, _class_names(state.get("names")), _image_size(content))


def recognised(found: Found) -> GivenWeights:
    """Return tensors under this project's names, and what they are of; None where it is none of the variants.

    Raises:
        PickleRefusedError: names of layers or classes that cannot be used.
    """
    if not any(name.startswith("model.") for name in found.tensors):
        return found.tensors, None
    try:
        tensors = from_yolov5(found.tensors)
        variant, num_classes = variant_of(found.tensors), num_classes_of(tensors)
        if variant is None or num_classes is None or difference(tensors, variant, num_classes):
            return tensors, None
        names = found.class_names or ()
        if len(names) != num_classes:
            names = tuple(f"class{number}" for number in range(num_classes))
        strides = torch.tensor(level_strides(variant), dtype=torch.float32).view(-1, 1, 1)
        anchors_px: Any = (tensors["detect.anchors"] * strides).tolist()
        size = found.image_size_px or (1280 if variant.endswith("6") else 640)
        return tensors, WeightsInfo(variant=variant, names=names, image_size_px=size, anchors_px=anchors_px)
    except ValidationError as error:
        raise PickleRefusedError(
            f"its names or settings cannot be used ({error.errors()[0]['msg']})"
        ) from None
    except ValueError as error:
        raise PickleRefusedError(str(error)) from None


def variant_of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the variant that tensors under YOLOv5's names are of, by their shapes; None where they are of none."""
    stem = tensors.get("model.0.conv.weight")
    if stem is None or stem.ndim != 4:
        return None
    highest = max(int(name.split(".")[1]) for name in tensors)
    family = "" if highest < len(P5) else "6"
    widths = {round(STEM_CHANNELS * width): size for size, (_, width) in DEPTH_WIDTH.items()}
    variant = f"yolov5{widths.get(len(stem))}{family}"
    return variant if variant in VARIANTS else None


def num_classes_of(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return K by the outputs of the head under this project's names, A * (5 + K) a level; None where they are no such."""
    head = tensors.get("detect.m.0.weight")
    if head is None or head.ndim != 4 or len(head) % ANCHORS_A_LEVEL:
        return None
    return max(len(head) // ANCHORS_A_LEVEL - 5, 0) or None


def difference(tensors: Mapping[str, torch.Tensor], variant: str, num_classes: int) -> str | None:
    """Return how tensors under this project's names differ from a variant; None where they are all of it."""
    expected = meta_network(variant, num_classes).state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != tensor.shape:
            return f"{name} is {tuple(tensors[name].shape)} and not {tuple(tensor.shape)}"
    return next(
        (f"{name} is there and not in that network" for name in tensors if name not in expected), None
    )


def _weights_in(content: Any) -> Inert | Mapping[Any, Any]:
    """Return the weights: a module or a state dict."""
    if isinstance(content, Inert):
        return content
    if isinstance(content, dict):
        for key in ("ema", "model", "state_dict", "model_state_dict"):
            if isinstance(content.get(key), Inert) or _is_state_dict(content.get(key)):
                return content[key]
        if _is_state_dict(content):
            return content
    raise PickleRefusedError("no network and no state dict is in it")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(one, LazyTensor) for one in value.values())


def _flattened(module: Inert, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the parameters and buffers of a module and of those within it, by their names."""
    state = module.state
    if not isinstance(state, dict) or depth > MOST_DEPTH:
        raise PickleRefusedError(f"its {prefix or 'network'} is no module of a network")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _tensors(_entries(state, kind)):
            yield f"{prefix}{name}", tensor
    for name, value in _entries(state, "_modules").items():
        if isinstance(name, str) and isinstance(value, Inert):
            yield from _flattened(value, f"{prefix}{name}.", depth + 1)


def _entries(state: Mapping[Any, Any], kind: str) -> Mapping[Any, Any]:
    entries = state.get(kind)
    return entries if isinstance(entries, dict) else {}


def _tensors(given: Mapping[Any, Any]) -> Iterator[tuple[str, LazyTensor]]:
    for name, value in given.items():
        if isinstance(name, str) and isinstance(value, LazyTensor):
            yield name, value


def _refuse_others(lazy: dict[str, LazyTensor]) -> None:
    """Put names and tensors in order; raise PickleRefusedError where they are of another network."""
    if not lazy or len(lazy) > MOST_TENSORS:
        raise PickleRefusedError(f"its network has {len(lazy):,} tensors")
    for name in [name for name in lazy if name.rpartition(".")[2] == _DROPPED]:
        del lazy[name]
    if all(name.startswith(_PREFIX) for name in lazy):
        for name in list(lazy):
            lazy[name.removeprefix(_PREFIX)] = lazy.pop(name)
    if any(".dfl." in name or ".cv3.0.0." in name for name in lazy):
        what = "its head has no anchors, as those of YOLOv5u, YOLOv8 and later of the package ultralytics"
        raise PickleRefusedError(f"{what}. Use the file of a YOLOv5 release from v6.0 to v7.0")
    if any(".proto." in name for name in lazy):
        raise PickleRefusedError("it is a network for segmentation, and dsyolo trains detectors")
    if _FOCUS in lazy:
        what = "it is a network of YOLOv5 v5.0 or earlier, whose first layer (Focus) and order of layers are others"
        raise PickleRefusedError(f"{what}. Use the file of a release from v6.0 to v7.0")
    if fused := next((name for name in lazy if name.endswith(".conv.bias")), None):
        what = f"its BatchNorm is folded into the convolutions ({fused}), as for inference"
        raise PickleRefusedError(f"{what}. Use the file as it was trained")


def _full_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _class_names(given: Any) -> tuple[str, ...] | None:
    if isinstance(given, dict):
        given = [given[key] for key in sorted(given)] if all(type(key) is int for key in given) else None
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return None
    return tuple(given)


def _image_size(content: Any) -> int | None:
    """Return the image size that a checkpoint's settings have, in px."""
    options = content.get("opt") if isinstance(content, dict) else None
    options = options.state if isinstance(options, Inert) else options
    size = options.get("imgsz") if isinstance(options, dict) else None
    return size if type(size) is int and size > 0 else None
