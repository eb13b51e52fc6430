"""Check the interpreter, packages, dsyolo's own files, the DeepSpeed JSON, and compiled ops with their build locks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsyolo.doctor.answers import Compilers, DeepSpeedJson, Locks, Package, Packages, Python, Sources
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

# A run imports these first, and so does the probe. Of the others it reads the version.
IMPORTED = {"torch": "torch", "deepspeed": "deepspeed"}
OTHERS = (
    "numpy",
    "opencv-python-headless",
    "pydantic",
    "safetensors",
    "faster-coco-eval",
    "pillow",
    "pyyaml",
)
PACKAGES: dict[str, str | None] = {**IMPORTED, **dict.fromkeys(OTHERS)}

# Keys for which DeepSpeed compiles an op, which op, and the values for which it does not.
OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "aio": ("async_io", ()),
    "compile.deepcompile": ("dc", (False,)),
    "zero_optimization.offload_optimizer.ratio": ("cpu_adam", (1, 1.0)),
    "zero_optimization.offload_optimizer.super_offload": ("cpu_adam", (False,)),
    "zero_optimization.offload_optimizer.pipeline_read": ("async_io", (False,)),
    "zero_optimization.offload_optimizer.pipeline_write": ("async_io", (False,)),
    "zero_optimization.zero_quantized_weights": ("quantizer", (False,)),
    "zero_optimization.zero_quantized_gradients": ("quantizer", (False,)),
    "zero_optimization.zero_quantized_nontrainable_weights": ("quantizer", (False,)),
}
OPTIMIZER_OPS = {
    "fusedadam": "fused_adam",
    "cpuadam": "cpu_adam",
    "deepspeedcpuadam": "cpu_adam",
    "lamb": "fused_lamb",
    "fusedlamb": "fused_lamb",
    "lion": "fused_lion",
    "fusedlion": "fused_lion",
}


def python(context: DoctorContext) -> Iterator[Finding]:
    """Check that all hosts have the same minor version."""
    found = dict(context.each(Python))
    if not found:
        return
    usual, usual_host = common({name: one.version for name, one in found.items()})
    for name, one in found.items():
        text = f"{one.version}, {one.executable}"
        if one.version == usual:
            yield Finding("python", name, OK, text)
            continue
        same = one.version.split(".")[:2] == usual.split(".")[:2]
        remedy = f"Install the same environment on all hosts, with Python {usual}."
        yield Finding(
            "python", name, WARNING if same else FAIL, f"{text}, but {usual} on {usual_host}", remedy
        )


def packages(context: DoctorContext) -> Iterator[Finding]:
    """Check that torch and deepspeed are the same and in the same place, and other packages of the same version."""
    found = {host: section.packages for host, section in context.each(Packages)}
    for name in IMPORTED if found else ():
        yield from _imported(name, {host: one.get(name, Package()) for host, one in found.items()})
    if len(found) > 1:
        versions = {
            host: tuple((name, one.get(name, Package()).version) for name in OTHERS)
            for host, one in found.items()
        }
        usual, usual_host = common(versions)
        for host, own in versions.items():
            odd = [
                f"{name} {version or 'missing'}, but {expected or 'missing'} on {usual_host}"
                for (name, version), (_, expected) in zip(own, usual, strict=True)
                if version != expected
            ]
            remedy = "Install with -c constraints.txt on all hosts." if odd else ""
            text = "; ".join(odd) or f"the same {len(OTHERS)} other packages"
            yield Finding("packages", host, WARNING if odd else OK, text, remedy)


def _imported(name: str, found: Mapping[str, Package]) -> Iterator[Finding]:
    whole = {host: (one.version, one.path) for host, one in found.items() if not one.error}
    (version, path), usual_host = common(whole) if whole else ((None, None), "")
    for host, one in found.items():
        install = f"Install {name}{f'=={version}' if version else ''} there, in the same environment."
        if one.error:
            yield Finding(name, host, FAIL, one.error, install)
        elif one.version != version:
            yield Finding(name, host, FAIL, f"{one.version}, but {version} on {usual_host}", install)
        elif one.path != path:
            remedy = "Use one path on all hosts: it may be another build."
            yield Finding(
                name, host, WARNING, f"{one.version} in {one.path}, but {path} on {usual_host}", remedy
            )
        else:
            yield Finding(name, host, OK, f"{one.version} in {one.path}")


def sources(context: DoctorContext) -> Iterator[Finding]:
    """Check that dsyolo is the same, file by file."""
    found = dict(context.each(Sources))
    for host in context.names:
        error = context.replies[host].sections.get("sources")
        if error is not None and error.error:
            remedy = "Copy the same checkout there, or install dsyolo into its environment."
            yield Finding("dsyolo", host, FAIL, error.error, remedy)
    if not found:
        return
    hashes = {host: tuple(sorted(one.files.items())) for host, one in found.items()}
    usual, usual_host = common(hashes)
    same = ", the same," if len(found) > 1 else ""
    for host, one in found.items():
        odd = sorted({name for name, _ in set(hashes[host]) ^ set(usual)})
        if odd:
            named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            remedy = f"Make it the same: git status, git pull, or copy it from {usual_host}."
            yield Finding("dsyolo", host, FAIL, f"{named} in {one.folder} differs from {usual_host}", remedy)
        elif one.folder != found[usual_host].folder:
            text = f"the same files in {one.folder}, but {found[usual_host].folder} on {usual_host}"
            yield Finding("dsyolo", host, WARNING, text, "Use one path on all hosts.")
        else:
            yield Finding("dsyolo", host, OK, f"{len(one.files)} files{same} in {one.folder}")


def deepspeed_json(context: DoctorContext) -> Iterator[Finding]:
    """Check that the JSON is valid for the run's ranks, and the same on all hosts."""
    name, path = "deepspeed_config", context.options.deepspeed_config
    for host, reply in context.replies.items():
        section = reply.sections.get("deepspeed_json")
        if section is not None and section.error:
            yield Finding(
                name, host, FAIL, f"cannot be checked: {section.error}", "Repair dsyolo there first."
            )
    found = dict(context.each(DeepSpeedJson))
    if not found:
        return
    usual, usual_host = common({host: one.digest for host, one in found.items()})
    ranks = f"{context.world_size} rank{'s' if context.world_size > 1 else ''}"
    for host, one in found.items():
        for problem in one.problems:
            fault, remedy = split_problem(problem, "Correct the JSON.")
            yield Finding(name, host, FAIL, f"{path}: {fault}", remedy)
        if one.digest != usual:
            text = (
                f"{path} differs from that on {usual_host}"
                if one.digest
                else f"{path} is missing, but exists on {usual_host}"
            )
            yield Finding(name, host, FAIL, text, f"Copy it from {usual_host}.")
        elif not one.problems:
            batch = f": {context.ds.global_batch} images a step" if context.ds else ""
            yield Finding(name, host, OK, f"{path} is valid for {ranks}{batch}")


def split_problem(problem: str, otherwise: str) -> tuple[str, str]:
    """Return (fault, remedy) of a problem line, in which the remedy follows the first sentence."""
    fault, stop, remedy = problem.strip().partition(". ")
    return (fault, remedy) if stop else (fault.rstrip("."), otherwise)


def ops(context: DoctorContext, source: Mapping[str, Any]) -> Iterator[Finding]:
    """Check for a compiler where the JSON needs a compiled op. dsyolo itself needs none."""
    needed = dict(_needed_ops(source))
    for host, one in context.each(Compilers):
        missing = [what for what, path in (("C++ compiler", one.compiler), ("ninja", one.ninja)) if not path]
        if not needed:
            yield Finding("ops", host, OK, "none to compile")
            continue
        keys = ", ".join(f"{key} needs {op}" for key, op in needed.items())
        leave_out = f"Leave out {' and '.join(needed)}: dsyolo does not need it."
        if missing:
            text = f"{keys}, but there is no {' and no '.join(missing)} to compile it"
            yield Finding("ops", host, FAIL, text, f"{leave_out} Or install g++ and ninja.")
        else:
            text = f"{keys}, compiled at the first start with {one.compiler}"
            yield Finding("ops", host, WARNING, text, leave_out)


def _needed_ops(source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, (op, harmless) in OPS.items():
        value: Any = source
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value not in harmless:
            yield path, op
    optimizer = source.get("optimizer")
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    if isinstance(kind, str) and kind.lower() in OPTIMIZER_OPS:
        yield "optimizer.type", OPTIMIZER_OPS[kind.lower()]


def locks(context: DoctorContext) -> Iterator[Finding]:
    """Check for locks that killed builds of ops left. dsyolo builds none, but others may share the folder."""
    for host, section in context.each(Locks):
        if not section.locks:
            yield Finding("locks", host, OK, f"none in {section.root}")
        for lock in section.locks:
            text = f"{lock.path}: {lock.state}, owned by {lock.owner}, {_age(lock.age_s)} old"
            if lock.state == "removed" or lock.state.startswith("held"):
                yield Finding("locks", host, OK, text)
            elif lock.state == "stale":
                remedy = "Remove it with --fix: whoever compiles this op waits for it forever."
                yield Finding("locks", host, WARNING, text, remedy)
            else:
                remedy = "If no build is running, remove the file by hand."
                yield Finding("locks", host, WARNING, text, remedy)


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
