"""The house keeps its order: who imports whom, and that importing does nothing. Read from the source by `ast`."""

from __future__ import annotations

import ast
import builtins
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_files import FILES, PACKAGE, each, imports, parse

# The folders and files directly in dsyolo/, from the ground up. Each imports from itself and from those before it.
ORDER = (
    "base",
    "config",
    "detection",
    "models",
    "data",
    "cluster",
    "config/resolve.py",  # puts together what config, data and models know of a run
    "engine",
    "checkpoint",
    "planner",
    "tracking",
    "inference",
    "trainer",
    "doctor",
    "scaling",
    "commands",
    "train",
    "cli",
)
ROOT_FILES = {"__init__", "train", "cli"}
# Functions that may be called while a module is imported, beside those of the module itself.
PURE = {
    "tuple",
    "frozenset",
    "set",
    "dict",
    "sorted",
    "range",
    "len",
    "object",
    "float",
    "int",
    "zip",
    "isinstance",
}
PURE |= {"TypeVar", "re", "field", "Field", "ConfigDict", "logging", "Path"}
PURE |= {
    "knob",
    "partial",
    "JsonKey",
    "JsonSection",
    "SetAside",
    "Alias",
    "Refused",
    "number",
    "one_of",
    "whole",
}  # make descriptions of keys
PURE |= {"Foreign", "flag", "ignored"}  # make descriptions of other programs' options
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
FORBIDDEN_CALLS = ("eval", "exec", "__import__", "compile")


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def unit_of(path: Path) -> str:
    name = str(path.relative_to(PACKAGE))
    return name if name in ORDER else name.split("/")[0].removesuffix(".py")


def modules_imported(path: Path) -> set[str]:
    """Modules of dsyolo that a file imports, also those that it names in a string: `-m dsyolo...`, `import_module`."""
    tree = parse(path)
    names = {name for name in imports(tree) if name.startswith("dsyolo.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            names |= set(re.findall(r"\bdsyolo(?:\.[a-z_0-9]+)+", node.value))
    return {name for name in names if name in MODULES}


def own_imports(path: Path) -> set[str]:
    """Units of dsyolo that a file imports from."""
    return {unit_of(MODULES[name]) for name in modules_imported(path)} - {"__init__"}


# ---- layers


def test_every_unit_has_a_place_and_exists():
    units = {unit_of(path) for path in FILES} - {"__init__"}
    assert units == set(ORDER)
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES


def test_imports_go_down():
    def check(path: Path) -> Iterator[str]:
        unit = unit_of(path)
        for other in sorted(own_imports(path) - {unit}):
            if unit != "__init__" and ORDER.index(other) > ORDER.index(unit):
                yield f"imports {other}, which is built on {unit}"

    each(check)


def test_strings_that_name_modules_are_seen_as_imports():
    assert "dsyolo.cluster.bandwidth" in modules_imported(PACKAGE / "doctor" / "examine.py")
    assert "dsyolo.data.fingerprint" in modules_imported(PACKAGE / "doctor" / "probe.py")


def test_no_circle_of_files():
    graph = {name: modules_imported(path) - {name} for name, path in MODULES.items()}
    left = dict(graph)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other in a circle, or such files: {sorted(left)}"


def test_no_two_files_of_one_name():
    counts = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert not [name for name, number in counts.items() if number > 1]


def test_models_data_and_loss_do_not_know_each_other():
    def check(path: Path) -> Iterator[str]:
        unit = unit_of(path)
        if unit in ("models", "data"):
            yield from sorted(own_imports(path) & {"models", "data"} - {unit})
            yield from sorted(modules_imported(path) & {"dsyolo.detection.loss"})
        if path.match("detection/loss.py"):
            yield from sorted(own_imports(path) & {"models", "data"})

    each(check)


def test_nobody_imports_the_entries():
    """But for `dsyolo train`, which is the other entry."""

    def check(path: Path) -> Iterator[str]:
        allowed = {"train"} if path == PACKAGE / "cli.py" else set()
        yield from sorted(own_imports(path) & {"train", "cli"} - allowed)

    each(check)


def test_only_engine_knows_of_deepspeed_and_only_cluster_and_engine_of_ranks():
    def check(path: Path) -> Iterator[str]:
        unit = unit_of(path)
        if unit == "engine":
            return
        tree = parse(path)
        for name in imports(tree):
            if name.split(".")[0] == "deepspeed":
                yield f"imports {name}"
            if name.startswith("torch.distributed") and unit != "cluster":
                yield f"imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
                yield f"line {node.lineno}: {ast.unparse(node)}"

    each(check)
    known = {
        name.split(".")[0] for path in FILES if unit_of(path) == "engine" for name in imports(parse(path))
    }
    assert "deepspeed" in known  # the check sees imports inside functions


def test_only_one_module_reads_the_environment():
    def check(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
            if text in ENVIRONMENT:
                yield f"line {node.lineno}: {text}"
        yield from sorted(set(imports(parse(path))) & ENVIRONMENT)

    # The probe is sent to hosts where dsyolo may not be.
    readers = [path for path in FILES if path.match("base/environment.py") or path.match("doctor/probe.py")]
    assert len(readers) == 2
    assert all(list(check(path)) for path in readers)  # it is seen
    each(lambda path: () if path in readers else check(path))


# ---- what nobody does


def test_no_eval_no_exec_no_global_no_sys_path():
    def check(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Attribute, ast.Global)) else ""
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS
            is_path = text == "sys.path" and not path.match("dsyolo/train.py")  # takes itself off it
            if is_call or isinstance(node, ast.Global) or is_path:
                yield f"line {node.lineno}: {text}"
        if any(name in ("sys.path", "pickle.load", "dill") for name in imports(parse(path))):
            yield "imports what it must not"

    each(check)


def test_modules_hold_definitions_and_constants():
    def check(path: Path) -> Iterator[str]:
        tree = parse(path)
        known = PURE | {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        known |= {name.id for node in tree.body for name in assigned(node)}
        yield from effects(tree.body, known)

    each(check)


def assigned(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target for target in targets if isinstance(target, ast.Name)]


def effects(body: list[ast.stmt], known: set[str]) -> Iterator[str]:
    """Statements of a module or class that do something when it is imported."""
    for node in body:
        text = f"line {node.lineno}: {ast.unparse(node)[:60]}"
        if isinstance(node, ast.ClassDef):
            yield from effects(node.body, known)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = all(isinstance(target, (ast.Name, ast.Tuple)) for target in getattr(node, "targets", ()))
            if not names or (node.value is not None and not set(called(node.value)) <= known):
                yield text
        elif isinstance(node, ast.Expr):
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                yield text
        elif isinstance(node, ast.If):
            if not ast.unparse(node.test).startswith(("__name__ == '__main__'", "TYPE_CHECKING")):
                yield text
        elif not isinstance(
            node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.Pass)
        ):
            yield text


def called(node: ast.AST) -> Iterator[str]:
    """The first names of what an expression calls when it is evaluated: what a lambda calls comes later."""
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        root = node.func
        while isinstance(root, (ast.Attribute, ast.Call, ast.Subscript)):
            root = root.func if isinstance(root, ast.Call) else root.value
        if not isinstance(root, ast.Constant):  # the methods of a literal do nothing
            yield root.id if isinstance(root, ast.Name) else ast.unparse(root)
    for child in ast.iter_child_nodes(node):
        yield from called(child)


@pytest.mark.parametrize(
    ("source", "fine"),
    [
        ('"""Text."""\nimport os\nA = frozenset({1})\nB: int = 2\ndef f(): os.remove("x")', True),
        ("def make(): ...\nA = make().items()", True),
        ("A = lambda: print(1)", True),
        ("class A:\n    '''Text.'''\n    x: int = 1\n    def f(self): print(1)", True),
        ("import os\nA = os.environ.get('HOME')", False),
        ("import os\nos.environ['A'] = '1'", False),
        ("print(1)", False),
        ("A = [open(x) for x in 'ab']", False),
        ("class A:\n    print(1)", False),
        ("for x in 'ab': ...", False),
        ("if True:\n    x = 1", False),
    ],
)
def test_the_check_of_effects_sees_effects(source, fine):
    tree = ast.parse(source)
    assert (not list(effects(tree.body, PURE | {"make"}))) == fine


PROBE = """
import json, os, pathlib, random, signal, sys, threading
import cv2, numpy, torch
before = dict(os.environ), torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
state = torch.get_num_threads(), cv2.getNumThreads(), threading.active_count(), sys.path[:]
for name in json.loads(sys.argv[1]):
    __import__(name)
after = dict(os.environ), torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
assert before == after, "the environment or a generator was changed"
assert state == (torch.get_num_threads(), cv2.getNumThreads(), threading.active_count(), sys.path), "settings"
assert not list(pathlib.Path().iterdir()), "files were written"
print(json.dumps([name for name in ("deepspeed", "wandb") if name in sys.modules]))
"""


def test_importing_everything_changes_nothing_and_loads_nothing_slow(tmp_path):
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES]
    modules = [name.removesuffix(".__init__") for name in modules]
    assert len(modules) > 30
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(modules)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []  # nothing else is printed; DeepSpeed and W&B cost seconds each


# ---- names and words


def test_no_file_hides_a_module_of_somebody_else():
    """`deepspeed dsyolo/train.py` puts dsyolo/ first on the module path: its names win over all others."""
    ours = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.name not in ("__pycache__", "__init__.py")
    }
    others = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - {"dsyolo"}
    assert {"json", "torch", "numpy", "deepspeed"} <= others
    assert not ours & others
    assert not ours & set(dir(builtins))


def test_what_is_public_says_what_it_is():
    def check(path: Path) -> Iterator[str]:
        tree = parse(path)
        if not ast.get_docstring(tree):
            yield "no docstring"
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                yield f"line {node.lineno}: {node.name} has no docstring"

    each(check)


def test_text_files_are_utf8_whatever_the_locale():
    """But for those that only read /proc."""
    reads_proc = {"doctor/probe.py", "planner/local_hardware.py", "cluster/preemption.py"}

    def check(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
                exempt = name == "read_text" and str(path.relative_to(PACKAGE)) in reads_proc
                if name in ("read_text", "write_text") and "encoding" not in given and not exempt:
                    yield f"line {node.lineno}: {name} without an encoding"

    each(check)
