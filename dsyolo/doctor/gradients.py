"""Runs the self-test of DeepSpeed's gradients on this machine, at the ZeRO stage of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from dsyolo.base.environment import all_variables
from dsyolo.doctor.context import DoctorContext
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

CHECK = "gradients"
DEFAULT_STAGE = 2  # where users report wrong gradients, and what most JSONs ask for
TIME_LIMIT_S = 120.0  # importing torch and DeepSpeed from a slow disk takes most of it


def gradients(context: DoctorContext) -> Iterator[Finding]:
    """Yield whether DeepSpeed's gradients are those of autograd."""
    stage = context.ds.zero_stage if context.ds else DEFAULT_STAGE
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dsyolo.engine.self_test", "--stage", str(stage)],
            env=all_variables(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT_S,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        yield finding(stage, json.loads(lines[-1]) if lines else None, reason)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        yield finding(stage, None, str(error)[:200])


def finding(stage: int, result: dict[str, Any] | None, reason: str = "") -> Finding:
    """Judge the line that the self-test printed; None: it printed none, for this reason."""
    if result is None:
        remedy = f"See: python -m dsyolo.engine.self_test --stage {stage}"
        return Finding(CHECK, "", WARNING, f"the self-test of ZeRO {stage} did not run: {reason}", remedy)
    what = f"ZeRO {stage} of DeepSpeed {result['deepspeed']}"
    if result["ok"]:
        return Finding(CHECK, "", OK, f"{what} computes those of autograd (error {result['error']:.0e})")
    text = f"{what} computes wrong ones: {result['worst']} differs from autograd by {result['error']:.0%}"
    remedy = "Install the tested version, deepspeed==0.19.8, or take a ZeRO stage that passes."
    return Finding(CHECK, "", FAIL, text, f"{remedy} Try: python -m dsyolo.engine.self_test --stage 1")
