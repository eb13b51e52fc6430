"""Judges the interpreter, the packages, dsyolo's own files, the JSON, and compiled ops with the locks of their builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsyolo.doctor.answers import Compilers, DeepSpeedJson, Locks, Package, Packages, Python, Sources
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

# Imported on each host: runs begin with these. Of the others the version is enough.
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

# Keys for which DeepSpeed compiles an op at the start, and the values that do not.
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


def python(case: DoctorContext) -> Iterator[Finding]:
    """The same minor version everywhere."""
    found = dict(case.each(Python))
    if not found:
        return
    most, there = common({name: one.version for name, one in found.items()})
    for name, one in found.items():
        text = f"{one.version}, {one.executable}"
        if one.version == most:
            yield Finding("python", name, OK, text)
            continue
        same = one.version.split(".")[:2] == most.split(".")[:2]
        remedy = f"Make the same environment on all hosts, with Python {most}."
        yield Finding("python", name, WARNING if same else FAIL, f"{text}, but {most} on {there}", remedy)


def packages(case: DoctorContext) -> Iterator[Finding]:
    """torch and deepspeed the same and at the same place; of the others, the same versions."""
    found = {host: section.packages for host, section in case.each(Packages)}
    for name in IMPORTED if found else ():
        yield from _imported(name, {host: one.get(name, Package()) for host, one in found.items()})
    if len(found) > 1:
        versions = {
            host: tuple((name, one.get(name, Package()).version) for name in OTHERS)
            for host, one in found.items()
        }
        most, there = common(versions)
        for host, own in versions.items():
            odd = [
                f"{name} {version or 'missing'}, but {usual or 'missing'} on {there}"
                for (name, version), (_, usual) in zip(own, most, strict=True)
                if version != usual
            ]
            remedy = "Install with -c constraints.txt on all hosts." if odd else ""
            text = "; ".join(odd) or f"{len(OTHERS)} other packages the same"
            yield Finding("packages", host, WARNING if odd else OK, text, remedy)


def _imported(name: str, found: Mapping[str, Package]) -> Iterator[Finding]:
    whole = {host: (one.version, one.path) for host, one in found.items() if not one.error}
    (version, path), there = common(whole) if whole else ((None, None), "")
    for host, one in found.items():
        install = f"Install {name}{f'=={version}' if version else ''} there, in the same environment."
        if one.error:
            yield Finding(name, host, FAIL, one.error, install)
        elif one.version != version:
            yield Finding(name, host, FAIL, f"{one.version}, but {version} on {there}", install)
        elif one.path != path:
            remedy = "The same, unless it is another build. Use one path on all hosts."
            yield Finding(name, host, WARNING, f"{one.version} in {one.path}, but {path} on {there}", remedy)
        else:
            yield Finding(name, host, OK, f"{one.version} in {one.path}")


def sources(case: DoctorContext) -> Iterator[Finding]:
    """dsyolo the same, file by file."""
    found = dict(case.each(Sources))
    for host in case.names:
        error = case.replies[host].sections.get("sources")
        if error is not None and error.error:
            remedy = "Put the same checkout there, or install dsyolo into its environment."
            yield Finding("dsyolo", host, FAIL, error.error, remedy)
    if not found:
        return
    hashes = {host: tuple(sorted(one.files.items())) for host, one in found.items()}
    usual, there = common(hashes)
    same = ", the same," if len(found) > 1 else ""
    for host, one in found.items():
        odd = sorted({name for name, _ in set(hashes[host]) ^ set(usual)})
        if odd:
            named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            remedy = f"Bring it to the same state: git status, git pull, or copy it from {there}."
            yield Finding("dsyolo", host, FAIL, f"{named} in {one.folder} not as on {there}", remedy)
        elif one.folder != found[there].folder:
            text = f"the same files in {one.folder}, but {found[there].folder} on {there}"
            yield Finding("dsyolo", host, WARNING, text, "Use one path on all hosts.")
        else:
            yield Finding("dsyolo", host, OK, f"{len(one.files)} files{same} in {one.folder}")


def deepspeed_json(case: DoctorContext) -> Iterator[Finding]:
    """Without a fault for so many ranks, and the same everywhere."""
    name, path = "deepspeed_config", case.options.deepspeed_config
    for host, reply in case.replies.items():
        section = reply.sections.get("deepspeed_json")
        if section is not None and section.error:
            yield Finding(name, host, FAIL, f"cannot be judged: {section.error}", "Mend dsyolo there first.")
    found = dict(case.each(DeepSpeedJson))
    if not found:
        return
    most, there = common({host: one.digest for host, one in found.items()})
    ranks = f"{case.world_size} rank{'s' if case.world_size > 1 else ''}"
    for host, one in found.items():
        for problem in one.problems:
            fault, remedy = parted(problem, "Correct the JSON.")
            yield Finding(name, host, FAIL, f"{path}: {fault}", remedy)
        if one.digest != most:
            text = f"{path} not as on {there}" if one.digest else f"{path} is missing, but there on {there}"
            yield Finding(name, host, FAIL, text, f"Copy it from {there}.")
        elif not one.problems:
            batch = f": {case.ds.global_batch} images a step" if case.ds else ""
            yield Finding(name, host, OK, f"{path} can be used on {ranks}{batch}")


def parted(problem: str, otherwise: str) -> tuple[str, str]:
    """(what is wrong, what to do) of a problem line, whose last sentence is the remedy."""
    fault, stop, remedy = problem.strip().partition(". ")
    return (fault, remedy) if stop else (fault.rstrip("."), otherwise)


def ops(case: DoctorContext, source: Mapping[str, Any]) -> Iterator[Finding]:
    """dsyolo needs no compiled op; for what needs one there must be a compiler, whatever else is said of it."""
    needed = dict(_needed_ops(source))
    for host, one in case.each(Compilers):
        missing = [what for what, path in (("C++ compiler", one.compiler), ("ninja", one.ninja)) if not path]
        if not needed:
            yield Finding("ops", host, OK, "none is compiled")
            continue
        keys = ", ".join(f"{key} needs {op}" for key, op in needed.items())
        if missing:
            text = f"{keys}, but there is no {' and no '.join(missing)} to compile it"
            remedy = f"Leave {' and '.join(needed)} out: dsyolo does without. Or install g++ and ninja."
            yield Finding("ops", host, FAIL, text, remedy)
        else:
            text = f"{keys}, compiled at the first start by {one.compiler}"
            yield Finding(
                "ops", host, WARNING, text, f"Leave {' and '.join(needed)} out: dsyolo does without."
            )


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


def locks(case: DoctorContext) -> Iterator[Finding]:
    """Builds of ops that were killed left their locks. dsyolo builds none, but others who share the folder do."""
    for host, section in case.each(Locks):
        if not section.locks:
            yield Finding("locks", host, OK, f"none in {section.root}")
        for lock in section.locks:
            text = f"{lock.path}: {lock.state}, of {lock.owner}, {_age(lock.age_s)} old"
            if lock.state == "removed" or lock.state.startswith("held"):
                yield Finding("locks", host, OK, text)
            elif lock.state == "stale":
                remedy = "Whatever compiles this op waits for it for ever. Remove it by --fix."
                yield Finding("locks", host, WARNING, text, remedy)
            else:
                remedy = "See whether a build runs; if not, remove the file by hand."
                yield Finding("locks", host, WARNING, text, remedy)


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
