"""Write the tree of dsyolo/ into docs/architecture.md: a line for each file, from the file's docstring.

python docs/tree.py            # write it
python docs/tree.py --check    # exit with 1 if it is out of date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: written by `python docs/tree.py` -->\n", "<!-- end of tree -->\n"
NAME_COLUMNS = 30


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".")


def lines(folder: Path, indent: str = "") -> Iterator[str]:
    """Yield a line for each file of a package, files before folders."""
    yield f"{indent + folder.name + '/':<{NAME_COLUMNS}} {first_line(folder / '__init__.py')}"
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"{indent + '  ' + path.name:<{NAME_COLUMNS}} {first_line(path)}"
    for path in sorted(folder.glob("*/__init__.py")):
        yield from lines(path.parent, indent + "  ")


def with_tree(page: str) -> str:
    """Return the page with a fresh tree between the two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tree = "\n".join(line.rstrip() for line in lines(ROOT / "dsyolo"))
    return f"{before}{BEGIN}```text\n{tree}\n```\n{END}{after}"


def main(argv: list[str]) -> int:
    """Write the page, or with --check only compare it; return the exit status."""
    old = PAGE.read_text(encoding="utf-8")
    new = with_tree(old)
    if "--check" in argv:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
