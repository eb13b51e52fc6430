"""Networks by name: the ten variants of YOLOv5, and a user's own as `FILE.py:FUNCTION`.

A user's own is code that runs. Its name must come from the command line, never from weights, checkpoints or data.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from dsyolo.base.errors import UserError
from dsyolo.base.user_code import is_reference, load_object, raised
from dsyolo.models.blocks import BatchNorm
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.yolov5 import VARIANTS, build_yolov5

MOST_LEVELS = 5


def is_known(name: str) -> bool:
    """Return whether `name` is one of the variants, which need no code of the user's."""
    return name in VARIANTS


def build_model(name: str, num_classes: int) -> DetectionNetwork:
    """Build the network that `--model` names, with its first weights, in train mode.

    Args:
        name: one of VARIANTS, or FILE.py:FUNCTION, from the command line only.

    Raises:
        UserError: the user's file or function cannot be used.
        ValueError: no such variant.
    """
    if not is_reference(name):
        return build_yolov5(name, num_classes)
    network = _call(name, num_classes)
    network.variant = saved_name(name)
    return network


@cache
def meta_network(name: str, num_classes: int = 2) -> DetectionNetwork:
    """Return the network without memory, for counting; a user's own is checked. It is shared: do not change it."""
    with torch.device("meta"):
        network = build_model(name, num_classes)
        if is_reference(name):
            _check(name, network)
        return network


def saved_name(name: str) -> str:
    """Return the name by which weights files know a network: of the user's own, the file without its folder."""
    return name if is_known(name) else Path(name).name


# ---- a user's own network


def _call(reference: str, num_classes: int) -> DetectionNetwork:
    with torch.device("cpu"):  # tensors that the file makes must not become those of a meta build
        build = load_object(reference, "--model")
    if not callable(build):
        raise _error(reference, f"{build!r} is not a function", "Name a function build(num_classes)")
    try:
        network = build(num_classes)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own function raises
        raise _error(reference, raised(error), "Fix the function") from error
    if not isinstance(network, DetectionNetwork):
        remedy = "It must return a DetectionNetwork: see docs/model.md"
        raise _error(reference, f"it returned a {type(network).__name__}", remedy)
    if network.num_classes != num_classes:
        rule = f"it returned a network of {network.num_classes} classes for build({num_classes})"
        raise _error(reference, rule, "Build the head for num_classes")
    return network


def _check(reference: str, network: DetectionNetwork) -> None:
    """Check the contract of a network on the meta device: what later steps would fail at, or get silently wrong."""
    strides, multiple = network.strides, network.size_multiple_px
    is_whole = all(type(size) is int and size > 0 for size in (*strides, multiple))
    if not is_whole or not 1 <= len(strides) <= MOST_LEVELS or list(strides) != sorted(set(strides)):
        rule = f"its strides are {strides}, and its size_multiple_px is {multiple}"
        raise _error(reference, rule, f"Give 1 to {MOST_LEVELS} strides, finest first, as whole pixels")
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad or parameter.dtype != torch.float32 or is_lazy(parameter):
            rule = f"{name} is frozen, without a shape yet, or not in fp32, and the engine shards trained fp32 weights"
            raise _error(reference, rule, "Make it a plain nn.Parameter; weights that stay go into a buffer")
    if any(multiple % stride for stride in strides):
        rule = f"its size_multiple_px, {multiple}, must be a multiple of every stride, {strides}"
        raise _error(reference, rule, f"Set it to {math.lcm(*strides)}")
    anchors = network.get_submodule(network.head)._buffers.get("anchors")
    if anchors is None or anchors.ndim != 3 or (len(anchors), anchors.shape[2]) != (len(strides), 2):
        shape = None if anchors is None else tuple(anchors.shape)
        rule = f"the buffer `anchors` of its last node, {network.head}, is {shape}"
        raise _error(reference, rule, f"It must be ({len(strides)}, A, 2), in cells")
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm):
            rule = f"{name} is a {type(module).__name__} of torch, whose statistics move twice in a checkpointed block"
            raise _error(reference, rule, "Use dsyolo.models.blocks.BatchNorm")
        if isinstance(module, _DropoutNd):
            rule = f"{name} is a {type(module).__name__}, which would draw different numbers when a checkpointed block is recomputed"
            raise _error(reference, rule, "Leave it out")
        if hidden := _hidden(module):
            rule = f"{name or 'the network'} keeps modules or parameters in {hidden}, a plain collection, where nothing trains them"
            raise _error(reference, rule, "Use nn.ModuleList, nn.ModuleDict or nn.ParameterList")
    in_nodes = [p for node in network.order for p in network.get_submodule(node).parameters()]
    if len(in_nodes) != len({id(p) for p in in_nodes}) or len(in_nodes) != len(list(network.parameters())):
        rule = "some of its parameters are in two nodes, or in none, so that no stage of a pipeline would own them"
        raise _error(reference, rule, "Give every parameter exactly one node")
    _check_shapes(reference, network, anchors.shape[1])


def _hidden(module: nn.Module) -> str | None:
    """Return the name of an attribute that holds modules or parameters which torch does not know of."""
    of_torch = vars(nn.Module()).keys()
    for name, value in vars(module).items():
        inside = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        if name not in of_torch and any(isinstance(one, (nn.Module, nn.Parameter)) for one in inside):
            return name
    return None


@torch.no_grad()
def _check_shapes(reference: str, network: DetectionNetwork, num_anchors: int) -> None:
    """Run the nodes on tensors without memory."""
    batch, height, width = 2, 2 * network.size_multiple_px, 3 * network.size_multiple_px
    boundary: tuple[Any, ...] = (torch.empty(batch, 3, height, width, dtype=torch.uint8, device="meta"),)
    for i, name in enumerate(network.order):
        try:
            boundary = network.run(boundary, i, i + 1)
        except Exception as error:  # whatever the user's own block raises
            rule = f"node {name} raised {type(error).__name__}: {error}"
            remedy = f"Images come as uint8 of {width} x {height} px in this check"
            raise _error(reference, rule, remedy) from error
        out = boundary[-1]
        if name != network.head and not (isinstance(out, torch.Tensor) and out.ndim == 4):
            rule = f"node {name} returned {tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}"
            raise _error(reference, rule, "Return one tensor of shape (B, C, H, W)")
    outputs = 5 + network.num_classes
    wanted = [(batch, num_anchors, height // s, width // s, outputs) for s in network.strides]
    maps = boundary[-1] if isinstance(boundary[-1], (tuple, list)) else ()
    if [tuple(raw.shape) for raw in maps] != wanted:
        given = [tuple(raw.shape) for raw in maps] or type(boundary[-1]).__name__
        rule = f"its last node returned {given} for images of {width} x {height} px"
        raise _error(reference, rule, f"Return maps of shapes {wanted}: B, A, H, W, 5 + K")


def _error(reference: str, rule: str, remedy: str) -> UserError:
    return UserError("This run cannot start", [f"--model: {reference} given, but {rule}. {remedy}."])
