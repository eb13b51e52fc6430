"""The self-test of DeepSpeed's gradients passes at every stage, and sees gradients that are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ranks import long_but, run_ranks
from source_files import PACKAGE

from dsyolo.doctor.software import gradients_finding as finding
from dsyolo.engine.self_test import STAGES, TOLERANCE


def command(stage: int) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "dsyolo.engine.self_test", "--stage", str(stage)]
    variables = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    variables["PYTHONPATH"] = str(PACKAGE.parent)
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", long_but([2], STAGES))
def test_the_installed_deepspeed_passes_in_one_line(stage):
    done = command(stage)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["stage"], found["ok"]) == (stage, True)
    assert found["error"] <= TOLERANCE
    assert finding(stage, found).verdict == "OK"


def forgets_a_micro_batch(stage: int) -> dict:
    from deepspeed.runtime.engine import DeepSpeedEngine

    plain, calls = DeepSpeedEngine.backward, []

    def backward(self, loss, **settings):
        calls.append(loss)
        return plain(self, loss * (len(calls) % 2 == 0), **settings)

    DeepSpeedEngine.backward = backward
    return result_of(stage)


def loses_the_end_of_a_bucket(stage: int) -> dict:
    """As a border that is off by one: the last element of each reduced bucket is lost."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    plain = DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads

    def reduce(self, param, i):
        param.grad.view(-1)[-1] = 0
        return plain(self, param, i)

    DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce
    name = "reduce_independent_p_g_buckets_and_remove_grads"
    plain3 = getattr(DeepSpeedZeroOptimizer_Stage3, name)

    def reduce3(self, param):
        param.grad.view(-1)[-1] = 0
        return plain3(self, param)

    setattr(DeepSpeedZeroOptimizer_Stage3, name, reduce3)
    return result_of(stage)


def result_of(stage: int) -> dict:
    from dsyolo.engine.self_test import run_self_test

    return run_self_test(stage)._asdict()


@pytest.mark.parametrize("stage", long_but([1, 3], STAGES))
def test_a_micro_batch_that_is_lost_is_seen(stage):
    (found,) = run_ranks(1, forgets_a_micro_batch, stage)
    assert not found["ok"]
    assert found["error"] > 0.1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_element_at_a_border_that_is_lost_is_seen(stage):
    (found,) = run_ranks(1, loses_the_end_of_a_bucket, stage)
    assert not found["ok"]
    assert found["error"] > 100 * TOLERANCE
    failed = finding(stage, found)
    assert failed.verdict == "FAIL"
    assert found["worst"] in failed.found
    assert "deepspeed==0.19.8" in failed.remedy


def test_a_self_test_that_does_not_run_is_a_warning_with_the_reason():
    failed = finding(2, None, "ModuleNotFoundError: No module named 'deepspeed'")
    assert failed.verdict == "WARNING"
    assert "No module named 'deepspeed'" in failed.found
    assert failed.remedy == "See: python -m dsyolo.engine.self_test --stage 2"
