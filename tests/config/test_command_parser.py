"""Command lines read word by word: all mistakes at once, and the values that argparse would give."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dsyolo.base.errors import UserError
from dsyolo.config.command_parser import parse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="x")
    made.add_argument("--weights", type=Path, required=True, help="a file")
    made.add_argument("--number", "--num-ber", type=int, default=3)
    made.add_argument("--share", type=float)
    made.add_argument("--kind", choices=("a", "b"), default="a")
    made.add_argument("--text", default="1", type=int)
    made.add_argument("--on", action="store_true")
    made.add_argument("--switch", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("first", type=Path, help="the first")
    made.add_argument("others", nargs="*", type=int)
    return made


@pytest.mark.parametrize(
    "argv",
    [
        ["--weights", "w", "one"],
        ["--weights=w", "one", "2", "3", "--on", "--no-switch"],
        ["--weights", "w", "--num-ber", "-5", "--share", ".5", "--kind", "b", "one", "--", "7"],
        ["--weights", "a=b", "--switch", "--text", "9", "x=y"],
        ["--weights", "--no_ssh_check --master_addr=10.0.0.1", "one"],
    ],
)
def test_it_reads_what_argparse_reads(argv: list[str]) -> None:
    assert vars(parse(parser(), argv, "x")) == vars(parser().parse_args(argv))


def test_dashes_are_underscores_and_flags_take_values() -> None:
    found = parse(parser(), ["--weights", "w", "--num_ber", "4", "--switch=False", "--on=true", "one"], "x")
    assert (found.number, found.switch, found.on) == (4, False, True)
    assert parse(parser(), ["--weights", "w", "--no_switch", "one"], "x").switch is False


def test_all_mistakes_at_once() -> None:
    argv = ["--number", "x", "--share", "y", "--kind", "c", "--on=maybe", "--numer", "1", "--swi", "--text"]
    with pytest.raises(UserError) as caught:
        parse(parser(), argv, "x")
    assert list(caught.value.problems) == [
        "--number: x given, but it must be a whole number. See --help.",
        "--share: y given, but it must be a number. See --help.",
        "--kind: c given, but it must be one of a, b. See --help.",
        "--on: maybe given, but it is a flag: true or false. Write --on alone, or leave it out.",
        "--numer: unknown option. Did you mean --number?",
        "--swi: unknown option. Did you mean --switch?",
        "--text: expected one argument. See --help.",
        "first: missing (the first).",
        "--weights: missing (a file).",
    ]


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(parser(), ["--number", "x", "--help"], "x")
    assert caught.value.code == 0
    assert "usage: x" in capsys.readouterr().out
