"""Files as YOLOv5 pickles them, made of stand-in classes under the same module paths: whole modules, in fp16."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.weights_info import from_yolov5

NODES = ("Conv", "C3", "SPPF", "Concat", "Detect", "Bottleneck")


@contextmanager
def modules_of_yolov5() -> Iterator[dict[str, type[nn.Module]]]:
    """The classes by name, importable as models.yolo and models.common while files are written."""
    packages = {name: ModuleType(name) for name in ("models", "models.yolo", "models.common")}
    classes: dict[str, type[nn.Module]] = {}
    for name in (*NODES, "DetectionModel"):
        home = "models.yolo" if name in ("Detect", "DetectionModel") else "models.common"
        classes[name] = type(name, (nn.Module,), {"__module__": home})
        setattr(packages[home], name, classes[name])
    before = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(packages)
    try:
        yield classes
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def as_module(network: DetectionNetwork, names: Any, classes: dict[str, type[nn.Module]]) -> nn.Module:
    """The network as a tree of stand-ins, whose state dict has YOLOv5's names."""
    model = classes["DetectionModel"]()
    model.model = nn.Sequential(*[_stand_in(network.get_submodule(name), classes) for name in network.order])
    model.names, model.yaml, model.nc = names, {"nc": network.num_classes, "anchors": 3}, network.num_classes
    model.stride = torch.tensor([float(stride) for stride in network.strides])
    assert from_yolov5(model.state_dict()).keys() == network.state_dict().keys()
    return model


def _stand_in(module: nn.Module, classes: dict[str, type[nn.Module]]) -> nn.Module:
    if type(module).__module__.startswith("torch.") and not list(module.children()):
        return copy.deepcopy(module)
    made = (
        nn.Sequential
        if isinstance(module, nn.Sequential)
        else classes.get(type(module).__name__, classes["Conv"])
    )()
    for name, child in module.named_children():
        made.add_module(name, _stand_in(child, classes))
    for name, parameter in module.named_parameters(recurse=False):
        made.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    for name, buffer in module.named_buffers(recurse=False):
        made.register_buffer(name, buffer.clone())
    return made


def save_checkpoint(
    path: Path, network: DetectionNetwork, names: Any, ema: DetectionNetwork | None = None
) -> None:
    """Write a checkpoint with what a training of YOLOv5 keeps in it: `ema`'s weights differ from `model`'s."""
    with modules_of_yolov5() as classes:
        model = as_module(network, names, classes).half()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.937)
        content = {
            "epoch": 3,
            "best_fitness": np.array([0.5])[0],
            "model": model,
            "ema": as_module(ema, names, classes).half() if ema is not None else None,
            "updates": 1234,
            "optimizer": optimizer.state_dict(),
            "opt": vars(argparse.Namespace(imgsz=320, save_dir=Path("runs/train/exp"), weights="yolov5s.pt")),
            "git": {"remote": None, "branch": None},
            "date": "2026-11-27T00:00:00",
        }
        torch.save(content, path)
