"""Run the self-test of DeepSpeed's gradients on this machine, at the ZeRO stage of the run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from dsyolo.base.environment import all_variables
from dsyolo.doctor.context import DoctorContext
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

DEFAULT_STAGE = 2  # where users report wrong gradients, and what most JSONs ask for
TIME_LIMIT_S = 120.0  # importing torch and DeepSpeed from a slow disk takes most of it


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
    yield finding(stage, result, reason[:200])


def finding(stage: int, result: dict[str, Any] | None, reason: str = "") -> Finding:
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
