"""The package's own source files, read by `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import dsyolo

PACKAGE = Path(dsyolo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, and every `module.name`, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def each(check) -> None:
    """Runs a check, which yields faults, over all files, and tells all faults at once."""
    faults = [f"{name_of(path)}: {fault}" for path in FILES for fault in check(path)]
    assert not faults, "\n" + "\n".join(faults)
