"""Names, sizes and anchors that weights have beside their tensors, and the names that YOLOv5's own files have for these."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dsyolo.base.errors import UserError
from dsyolo.base.text import name_fault
from dsyolo.models.yolov5 import P5, P6

AnchorsPx: TypeAlias = tuple[tuple[tuple[float, float], ...], ...]  # by level


class WeightsInfo(BaseModel):
    """The metadata of a weights file: what is needed, besides the tensors, to rebuild the network."""

    model_config = ConfigDict(frozen=True)

    variant: str
    names: tuple[str, ...]
    image_size_px: int = Field(ge=32, le=1 << 14)
    anchors_px: AnchorsPx

    @field_validator("names")
    @classmethod
    def _can_be_shown(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(names):
            if fault := name_fault(name):
                raise ValueError(f"class {number}: {fault}")
        if len(set(names)) < len(names):
            raise ValueError("two classes have one name")
        return names


GivenWeights: TypeAlias = tuple[dict[str, torch.Tensor], WeightsInfo | None]


def from_yolov5(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename `model.<index>.<rest>` to `<node>.<rest>`, or raise ValueError. The highest index decides on the family."""
    indices = {}
    for name in state_dict:
        head, _, rest = name.removeprefix("model.").partition(".")
        if not name.startswith("model.") or not head.isdigit() or not rest:
            raise ValueError(f"{name!r} is not a YOLOv5 name: those are model.<index>.<...>")
        indices[name] = (int(head), rest)
    table = P6 if max((i for i, _ in indices.values()), default=0) >= len(P5) else P5
    if any(i >= len(table) for i, _ in indices.values()):
        raise ValueError(f"a YOLOv5 network has at most {len(table)} layers, these names go further")
    return {f"{table[i].name}.{rest}": state_dict[name] for name, (i, rest) in indices.items()}


def unusable(path: Path, problem: str) -> UserError:
    """Return the error for a weights file."""
    return UserError(f"{path} cannot be used as weights", [problem])
