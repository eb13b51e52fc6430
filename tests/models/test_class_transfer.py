"""`--transfer_classes`: the last layer's rows go with the names of the classes."""

from __future__ import annotations

import pytest
import torch
from resolving import resolved_in

from dsyolo.base.errors import UserError
from dsyolo.models.class_transfer import head_of_classes
from dsyolo.models.weights import describe, load_into, save_weights
from dsyolo.models.yolov5 import build_yolov5

GIVEN, NAMES = ("cat", "dog", "emu"), ("dog", "fox", "cat", "gnu")


def test_rows_by_hand():
    given = {"m": torch.arange(16.0).view(16, 1) + 1}  # 2 anchors, 5 + 3 rows
    fresh = {"m": -torch.ones(18, 1)}  # 5 + 4
    head = head_of_classes(fresh, given, NAMES, GIVEN)["m"].view(2, 9)
    assert head[0].tolist() == [1, 2, 3, 4, 5, 7, -1, 6, -1]
    assert head[1].tolist() == [9, 10, 11, 12, 13, 15, -1, 14, -1]
    assert fresh["m"].eq(-1).all()  # what was given stays


@torch.no_grad()
def test_a_class_of_the_same_name_is_scored_as_before(tmp_path):
    torch.manual_seed(0)
    source, target = build_yolov5("yolov5n", len(GIVEN)).eval(), build_yolov5("yolov5n", len(NAMES)).eval()
    path = tmp_path / "w.safetensors"
    save_weights(path, source.state_dict(), describe(source, GIVEN, 64))
    line = load_into(target, path, names=NAMES)
    assert line.endswith("; last layer kept for 2 of 4 classes")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for old, new in zip(source(images), target(images), strict=True):
        torch.testing.assert_close(new[..., :5], old[..., :5])
        torch.testing.assert_close(new[..., [5, 7]], old[..., [6, 5]])


def test_what_cannot_be_kept_is_named(tmp_path):
    source, path = build_yolov5("yolov5n", len(GIVEN)), tmp_path / "w.safetensors"
    save_weights(path, source.state_dict(), describe(source, GIVEN, 64))
    with pytest.raises(
        UserError, match=r"none of the classes to train is in it, .*\(its classes: cat, dog, emu\)"
    ):
        load_into(build_yolov5("yolov5n", 1), path, names=("axolotl",))
    with pytest.raises(UserError, match=r"--transfer_classes: true given, but there are no weights"):
        resolved_in(tmp_path, ["--transfer_classes"])
