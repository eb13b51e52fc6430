"""How a message says to go on: by --resume auto, or by the command as it was."""

from __future__ import annotations

import pytest

from dsyolo.base.resume_words import AUTO, CHOICES, SAME, same_command, way_on
from dsyolo.config.messages import choices_of
from dsyolo.config.run_config import RunConfig


@pytest.mark.parametrize(
    ("argv", "way"),
    [
        ([], AUTO),
        (["--resume"], AUTO),
        (["--resume", "--epochs", "3"], AUTO),
        (["--resume", "auto"], AUTO),
        (["--resume=True"], AUTO),
        (["resume=true"], AUTO),
        (["--resume", "runs/a", "--epochs", "3"], SAME),
        (["--resume=runs/a"], SAME),
        (["resume=runs/a/weights/last.pt"], SAME),
        (["--resume", "runs/a", "--restarted", "--resume=auto"], SAME),
        (["--resume", "runs/a", "--resume", "auto"], AUTO),  # the last one holds
    ],
)
def test_a_path_is_resumed_by_the_same_command(argv: list[str], way: str) -> None:
    assert way_on(argv) == way
    assert same_command(argv) == (
        "the same command" if way == SAME else "the same command with --resume auto"
    )


def test_the_choices_are_those_of_the_option() -> None:
    assert set(CHOICES) == set(choices_of(RunConfig.model_fields["resume"]))
