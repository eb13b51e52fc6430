"""The house keeps its order: who imports whom, and that importing does nothing. Read from the source by `ast`."""

from __future__ import annotations

import ast
import builtins
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsyolo

PACKAGE = Path(dsyolo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Units of a layer: files and folders directly in dsyolo/. A unit imports from itself and from lower layers;
# the ground layer's modules from those named before them.
GROUND = (
    "errors",
    "streams",
    "environment",
    "untrusted",
    "problems",
    "options",
    "config",
    "command_line",
    "ds_keys",
    "ds_read",
    "ds_checks",
    "ds_config",
    "batch",
    "boxes",
    "nvml",
)
LAYERS = (
    GROUND,
    (
        "model",
        "data",
        "assign",
        "loss",
        "optim",
        "metrics",
        "pictures",
        "painter",
        "sinks",
        "account",
        "usage",
    ),
    ("parallel",),
    ("validate", "pace", "record"),
    ("track",),
    ("build", "doctor", "plan"),
    ("accounts", "scale", "run_folder"),
    ("loop",),
    ("train", "cli"),
)
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}
# Functions that may be called while a module is imported, beside those of the module itself.
PURE = {"tuple", "frozenset", "set", "dict", "sorted", "range", "len", "object", "float", "int", "zip"}
PURE |= {"TypeVar", "re", "field", "Field", "ConfigDict"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
FORBIDDEN_CALLS = ("eval", "exec", "__import__", "compile")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def own_imports(path: Path) -> set[str]:
    """Units of dsyolo that a file imports from."""
    return {
        name.split(".")[1] for name in imports(parse(path)) if name.startswith("dsyolo.")
    } & LAYER_OF.keys()


def each(check) -> None:
    """Runs a check, which yields faults, over all files, and tells all faults at once."""
    faults = [f"{name_of(path)}: {fault}" for path in FILES for fault in check(path)]
    assert not faults, "\n" + "\n".join(faults)


# ---- layers


def test_every_unit_has_a_layer_and_exists():
    units = {unit_of(path) for path in FILES} - {"__init__"}
    assert units == LAYER_OF.keys()


def test_imports_go_down():
    def check(path: Path) -> Iterator[str]:
        unit = unit_of(path)
        for other in sorted(own_imports(path) - {unit}):
            if unit in GROUND and other in GROUND:
                if GROUND.index(other) > GROUND.index(unit):
                    yield f"imports {other}, which is built on it"
            elif unit != "__init__" and LAYER_OF[other] >= LAYER_OF[unit]:
                yield f"imports {other}, of layer {LAYER_OF[other]}; it is of layer {LAYER_OF[unit]} itself"

    each(check)


def test_model_data_and_loss_do_not_know_each_other():
    apart = {"model", "data", "loss"}

    def check(path: Path) -> Iterator[str]:
        if unit_of(path) in apart:
            yield from sorted(own_imports(path) & apart - {unit_of(path)})

    each(check)


def test_nobody_imports_the_entries():
    def check(path: Path) -> Iterator[str]:
        yield from sorted(own_imports(path) & {"train", "cli"})

    each(check)


def test_only_parallel_knows_of_deepspeed_and_of_ranks():
    def check(path: Path) -> Iterator[str]:
        if unit_of(path) == "parallel":
            return
        tree = parse(path)
        for name in imports(tree):
            if name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed"):
                yield f"imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
                yield f"line {node.lineno}: {ast.unparse(node)}"

    each(check)
    known = {
        name.split(".")[0] for path in FILES if unit_of(path) == "parallel" for name in imports(parse(path))
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
    readers = [path for path in FILES if unit_of(path) == "environment" or path.match("doctor/probe.py")]
    assert len(readers) == 2
    assert all(list(check(path)) for path in readers)  # it is seen
    each(lambda path: () if path in readers else check(path))


# ---- what nobody does


def test_no_eval_no_exec_no_global_no_sys_path():
    def check(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Attribute, ast.Global)) else ""
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS
            if is_call or isinstance(node, ast.Global) or text == "sys.path":
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
            if ast.unparse(node.test) not in ("__name__ == '__main__'", "TYPE_CHECKING"):
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
