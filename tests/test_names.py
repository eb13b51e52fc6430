"""No retired name comes back, and only commands' reports print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from source_files import each, parse

# Names that an earlier edition used where the field has its own: never whole identifiers again...
WHOLE = """
Alone Case Claim Crew Finder Holding InParts Key Link Load Measured Meeting Painter Phases Piece Place ReadingCrew
Record Row Scan Scanned Seat Settings Shards Spread StopRequest Stopped Strategy Stream Terms Truth Usage Work account
carry crossing decided_by_first each_alone first_step flop_utilisation goes_on heed is_first pace painter publish
rehearsal rehearse replica replicas shards shared_out showing sinks spread streams together truth truths wire words
"""
# ... nor parts of one.
PARTS = "claim crew heard meeting painter rehearsal said say scanned tell told"
RETIRED, RETIRED_PARTS = set(WHOLE.split()), set(PARTS.split())


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that the source gives or uses, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            yield node.lineno, node.arg


def parts(name: str) -> set[str]:
    """The words in a snake_case or CamelCase name."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def retired(name: str) -> bool:
    return name.lstrip("_") in RETIRED or bool(parts(name) & RETIRED_PARTS)


def test_no_retired_name_is_left():
    def check(path: Path) -> Iterator[str]:
        found = {(line, name) for line, name in identifiers(parse(path)) if retired(name)}
        yield from (f"line {line}: {name}" for line, name in sorted(found))
        if retired(path.stem):
            yield "the file's name"

    each(check)


def test_no_test_has_a_retired_name():
    words = RETIRED_PARTS | {"meeting", "painter", "replica", "replicas", "wire", "spread", "shards"}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        names = [name for _, name in identifiers(parse(path)) if name.startswith("test_")]
        assert not [name for name in names if words & set(name.split("_"))], path.name


def test_the_check_of_names_sees_them():
    tree = ast.parse(
        "def told(): ...\nx.is_first\nclass Claim: ...\nf(crew=1)\nlambda truth: 0\nretold, sayings = 1, 2"
    )
    assert [name for _, name in identifiers(tree) if retired(name)] == [
        "told",
        "Claim",
        "is_first",
        "crew",
        "truth",
    ]


def test_only_commands_print():
    def check(path: Path) -> Iterator[str]:
        if (
            path.parent.name == "commands"
            or path.match("doctor/probe*.py")
            or path.match("cluster/bandwidth.py")
        ):
            return
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"line {node.lineno}: print"

    each(check)
