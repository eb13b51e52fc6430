"""The order of the test files: those with the longest tests first, so that no worker waits for another at the end."""

import pytest

FIRST = (
    "end_to_end",
    "trainer",
    "planner",
    "doctor",
    "scaling",
    "cluster",
    "engine",
)  # measured, with two workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder; the order within a file stays."""
    ranks = {folder: rank for rank, folder in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(FIRST)))
