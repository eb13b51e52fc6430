"""docs/architecture.md: its tree is the package's, and its exceptions are all there are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from runs import ROOT
from source_files import FILES, name_of, parse

PAGE = ROOT / "docs" / "architecture.md"
MOST_FILE_LINES, MOST_FUNCTION_LINES = 320, 70


def test_the_tree_is_up_to_date():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "tree.py"), "--check"])
    assert done.returncode == 0, "docs/architecture.md has an old tree. Write it again: python docs/tree.py"


def test_every_module_has_a_line_in_the_tree():
    tree = PAGE.read_text().partition("```text\n")[2].partition("```")[0]
    rows = {line.split()[0] for line in tree.splitlines()}
    assert {path.name for path in FILES if path.name != "__init__.py"} <= rows
    assert not [line for line in tree.splitlines() if len(line.split()) < 2]


def test_the_page_lists_all_long_files_and_functions():
    long = {name_of(path) for path in FILES if len(path.read_text().splitlines()) > MOST_FILE_LINES}
    for path in FILES:
        for node in ast.walk(parse(path)):
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_function and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES:
                long.add(f"{name_of(path)}:{node.name}")
    section = PAGE.read_text().partition("## Long files and functions")[2]
    listed = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    assert long == listed, (
        f"docs/architecture.md, Long files and functions: give a reason for {sorted(long - listed)}, "
        f"remove {sorted(listed - long)}"
    )
