"""Check Python, packages, dsyolo's own files, the DeepSpeed JSON, compiled ops and their locks, and gradients."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from dsyolo.base.environment import all_variables
from dsyolo.config.deepspeed.set_aside import explain
from dsyolo.config.messages import counted
from dsyolo.doctor.answers import DeepSpeedJson, Devices, Locks, Package, Packages, Python, Sources
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding, split_problem

# A run imports these first, and so does the probe. Of the others it reads the version.
IMPORTED = ("torch", "deepspeed")
OTHERS = (
    *("numpy", "opencv-python-headless", "pydantic", "safetensors"),
    *("faster-coco-eval", "pillow", "pyyaml"),
)
PACKAGES: dict[str, str | None] = {**{name: name for name in IMPORTED}, **dict.fromkeys(OTHERS)}

# Keys for which DeepSpeed compiles an op, and which op.
OPS = {
    "aio": "async_io",
    "compile.deepcompile": "dc",
    "zero_optimization.offload_optimizer.ratio": "cpu_adam",
    "zero_optimization.offload_optimizer.super_offload": "cpu_adam",
    "zero_optimization.offload_optimizer.pipeline_read": "async_io",
    "zero_optimization.offload_optimizer.pipeline_write": "async_io",
    "zero_optimization.zero_quantized_weights": "quantizer",
    "zero_optimization.zero_quantized_gradients": "quantizer",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantizer",
}
OPTIMIZER_OPS = {
    **{"fusedadam": "fused_adam", "cpuadam": "cpu_adam", "deepspeedcpuadam": "cpu_adam"},
    **{"lamb": "fused_lamb", "fusedlamb": "fused_lamb", "lion": "fused_lion", "fusedlion": "fused_lion"},
}

DEFAULT_STAGE = 2  # where users report wrong gradients, and what most JSONs ask for
TIME_LIMIT_S = (
    120.0  # limit of the self-test: importing torch and DeepSpeed from a slow disk takes most of it
)


def python(context: DoctorContext) -> Iterator[Finding]:
    """Check that all hosts have the same minor version."""
    found = context.answers(Python)
    if not found:
        return
    usual, usual_host = common({name: one.version for name, one in found.items()})
    for name, one in found.items():
        text = f"{one.version}, {one.executable}"
        if one.version == usual:
            yield Finding("python", name, OK, text)
            continue
        verdict = WARNING if one.version.split(".")[:2] == usual.split(".")[:2] else FAIL
        remedy = f"Install the same environment on all hosts, with Python {usual}."
        yield Finding("python", name, verdict, f"{text}, but {usual} on {usual_host}", remedy)


def packages(context: DoctorContext) -> Iterator[Finding]:
    """Check that torch and deepspeed are the same and in the same place, and other packages of the same version."""
    answers = context.answers(Packages)
    found = {
        host: {name: one.packages.get(name, Package()) for name in PACKAGES} for host, one in answers.items()
    }
    for name in IMPORTED if found else ():
        yield from _imported(name, {host: one[name] for host, one in found.items()})
    if len(found) < 2:
        return
    versions = {host: tuple(one[name].version for name in OTHERS) for host, one in found.items()}
    usual, usual_host = common(versions)
    for host, own in versions.items():
        odd = [
            f"{name} {version or 'missing'}, but {expected or 'missing'} on {usual_host}"
            for name, version, expected in zip(OTHERS, own, usual, strict=True)
            if version != expected
        ]
        text = "; ".join(odd) or f"the same {len(OTHERS)} other packages"
        remedy = "Install with -c constraints.txt on all hosts." if odd else ""
        yield Finding("packages", host, WARNING if odd else OK, text, remedy)


def _imported(name: str, found: Mapping[str, Package]) -> Iterator[Finding]:
    whole = {host: (one.version, one.path) for host, one in found.items() if not one.error}
    (version, path), usual_host = common(whole) if whole else ((None, None), "")
    for host, one in found.items():
        finding = partial(Finding, name, host)
        install = f"Install {name}{f'=={version}' if version else ''} there, in the same environment."
        text = f"{one.version} in {one.path}"
        if one.error:
            yield finding(FAIL, one.error, install)
        elif one.version != version:
            yield finding(FAIL, f"{one.version}, but {version} on {usual_host}", install)
        elif one.path != path:
            remedy = "Use one path on all hosts: it may be another build."
            yield finding(WARNING, f"{text}, but {path} on {usual_host}", remedy)
        else:
            yield finding(OK, text)


def sources(context: DoctorContext) -> Iterator[Finding]:
    """Check that dsyolo is the same, file by file."""
    found = context.answers(Sources)
    if not found:
        return
    hashes = {host: tuple(sorted(one.files.items())) for host, one in found.items()}
    usual, usual_host = common(hashes)
    same = ", the same," if len(found) > 1 else ""
    for host, one in found.items():
        finding = partial(Finding, "dsyolo", host)
        odd = sorted({name for name, _ in set(hashes[host]) ^ set(usual)})
        if odd:
            named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            remedy = f"Make it the same: git status, git pull, or copy it from {usual_host}."
            yield finding(FAIL, f"{named} in {one.folder} differs from {usual_host}", remedy)
        elif one.folder != found[usual_host].folder:
            text = f"the same files in {one.folder}, but {found[usual_host].folder} on {usual_host}"
            yield finding(WARNING, text, "Use one path on all hosts.")
        else:
            yield finding(OK, f"{len(one.files)} files{same} in {one.folder}")


def deepspeed_json(context: DoctorContext) -> Iterator[Finding]:
    """Check that the JSON is valid for the run's ranks, and the same on all hosts."""
    path, found = context.options.deepspeed_config, context.answers(DeepSpeedJson)
    if not found:
        return
    usual, usual_host = common({host: one.digest for host, one in found.items()})
    for host, one in found.items():
        finding = partial(Finding, "deepspeed_config", host)
        for problem in one.problems:
            fault, remedy = split_problem(problem, "Correct the JSON.")
            yield finding(FAIL, f"{path}: {fault}", remedy)
        if one.digest != usual:
            fault = "differs from that" if one.digest else "is missing, but exists"
            yield finding(FAIL, f"{path} {fault} on {usual_host}", f"Copy it from {usual_host}.")
        elif not one.problems:
            batch = f": {context.ds.global_batch} images a step" if context.ds else ""
            aside = "".join(f"; {line}" for line in explain(context.ds.set_aside)) if context.ds else ""
            yield finding(OK, f"{path} is valid for {counted(context.world_size, 'rank')}{batch}{aside}")


def ops(context: DoctorContext) -> Iterator[Finding]:
    """Check for a compiler where the JSON needs a compiled op. dsyolo itself needs none."""
    needed = dict(_needed_ops(context.source))
    keys = ", ".join(f"{key} needs {op}" for key, op in needed.items())
    leave_out = f"Leave out {' and '.join(needed)}: dsyolo does not need it."
    for host, one in context.answers(Devices).items():
        missing = [name for name, path in (("C++ compiler", one.compiler), ("ninja", one.ninja)) if not path]
        if not needed:
            yield Finding("ops", host, OK, "none to compile")
        elif missing:
            text = f"{keys}, but there is no {' and no '.join(missing)} to compile it"
            yield Finding("ops", host, FAIL, text, f"{leave_out} Or install g++ and ninja.")
        else:
            text = f"{keys}, compiled at the first start with {one.compiler}"
            yield Finding("ops", host, WARNING, text, leave_out)


def _needed_ops(source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, op in OPS.items():
        value: Any = source
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        is_default = path.endswith(".ratio") and value == 1
        if value is not None and value is not False and not is_default:
            yield path, op
    optimizer = source.get("optimizer")
    kind = str(optimizer.get("type")).lower() if isinstance(optimizer, dict) else ""
    if kind in OPTIMIZER_OPS:
        yield "optimizer.type", OPTIMIZER_OPS[kind]


def locks(context: DoctorContext) -> Iterator[Finding]:
    """Check for locks that killed builds of ops left. dsyolo builds none, but others may share the folder."""
    for host, section in context.answers(Locks).items():
        if not section.locks:
            yield Finding("locks", host, OK, f"none in {section.root}")
        for lock in section.locks:
            text = f"{lock.path}: {lock.state}, owned by {lock.owner}, {_age(lock.age_s)} old"
            if lock.state == "removed" or lock.state.startswith("held"):
                yield Finding("locks", host, OK, text)
                continue
            remedy = "If no build is running, remove the file by hand."
            if lock.state == "stale":
                remedy = "Remove it with --fix: whoever compiles this op waits for it forever."
            yield Finding("locks", host, WARNING, text, remedy)


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def gradients(context: DoctorContext) -> Iterator[Finding]:
    """Check that DeepSpeed's gradients are those of autograd."""
    stage = context.ds.zero_stage if context.ds else DEFAULT_STAGE
    command = [sys.executable, "-m", "dsyolo.engine.self_test", "--stage", str(stage)]
    options: dict[str, Any] = {"env": all_variables(), "stdin": subprocess.DEVNULL, "capture_output": True}
    result = None
    try:
        done = subprocess.run(command, text=True, errors="replace", timeout=TIME_LIMIT_S, **options)
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        result = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    yield gradients_finding(stage, result, reason[:200])


def gradients_finding(stage: int, result: dict[str, Any] | None, reason: str = "") -> Finding:
    """Judge the self-test's result; None: it did not run, for this reason."""
    if result is None:
        remedy = f"See: python -m dsyolo.engine.self_test --stage {stage}"
        return Finding(
            "gradients", "", WARNING, f"the self-test of ZeRO {stage} did not run: {reason}", remedy
        )
    subject = f"ZeRO {stage} in DeepSpeed {result['deepspeed']}"
    if result["ok"]:
        return Finding("gradients", "", OK, f"{subject} equals autograd (error {result['error']:.0e})")
    text = f"{subject} is wrong: {result['worst']} differs from autograd by {result['error']:.0%}"
    remedy = "Install the tested version, deepspeed==0.19.8, or use a ZeRO stage that passes."
    return Finding("gradients", "", FAIL, text, f"{remedy} Try: python -m dsyolo.engine.self_test --stage 1")
