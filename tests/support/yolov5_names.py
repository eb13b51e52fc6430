"""The parameter names of YOLOv5's own files, out of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsyolo.models.yolov5 import P5, P6


def to_yolov5(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename `<node>.<rest>` to `model.<index>.<rest>`, the inverse of `from_yolov5`.

    Raises:
        ValueError: a name belongs to no node of the family.
    """
    nodes = {name.partition(".")[0] for name in state_dict}
    table = P6 if nodes & ({row.name for row in P6} - {row.name for row in P5}) else P5
    index = {row.name: i for i, row in enumerate(table)}
    unknown = sorted(nodes - index.keys())
    if unknown:
        raise ValueError(f"no layer of YOLOv5 is called {', '.join(unknown)}")
    renamed = {}
    for name, tensor in state_dict.items():
        node, _, rest = name.partition(".")
        renamed[f"model.{index[node]}.{rest}"] = tensor
    return renamed
