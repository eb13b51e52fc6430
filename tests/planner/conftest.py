"""Profiles of models are counted once for all tests of a worker: each takes seconds, and is the same every time."""

from functools import cache

import pytest

from dsyolo.config.run_config import MODELS
from dsyolo.planner import auto, model_profile
from dsyolo.planner.model_profile import ModelProfile

_counted = cache(ModelProfile)


def _profile(model: str, num_classes: int, image_size_px: int) -> ModelProfile:
    return (_counted if model in MODELS else ModelProfile)(model, num_classes, image_size_px)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (auto, model_profile):
        monkeypatch.setattr(module, "ModelProfile", _profile)
