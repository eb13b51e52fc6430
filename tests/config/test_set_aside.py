"""Strangers' DeepSpeed JSONs: what is accepted, what is set aside with its reason, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from runs import alone, make_place

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.config import DeepSpeedConfig, check
from dsyolo.config.deepspeed.json_reader import read_json, read_source
from dsyolo.config.deepspeed.schema import TOP_LEVEL, Alias, JsonKey, JsonSection, Refused, SetAside
from dsyolo.config.resolve import PlannedConfig
from dsyolo.config.run_config import RunConfig
from dsyolo.planner.auto import plan_config
from dsyolo.planner.hardware import DEVICES, GIB, Hardware

LINES = (Path(__file__).parent / "deepspeed_json.jsonl").read_text(encoding="utf-8").splitlines()
CASES = {case["name"]: case for case in map(json.loads, LINES)}
CPU = Hardware(DEVICES["T4"], 1, 2, 16 * GIB, None, 3e9, "cpu")
MICRO = {"train_micro_batch_size_per_gpu": 2}
TRAINED = ("bucket of 5e8 for a model of 2e6", "WarmupLR")  # what they print is printed by a run


def written(folder: Path, content: Any) -> Path:
    path = folder / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def resolved(path: Path, hardware: Hardware = CPU) -> PlannedConfig:
    """The JSON on two ranks, planned where it leaves something open."""
    source = read_source(path)
    if source.left_open:
        run = RunConfig(data="data.yaml", deepspeed_config=str(path))
        return plan_config(run, source, hardware, 80)
    return PlannedConfig(check(source, world_size=2, accelerator=hardware.accelerator))


def accepted(**blocks: Any) -> DeepSpeedConfig:
    return check({**MICRO, **blocks}, world_size=2, accelerator="cuda")


def refusal(content: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        check(content, world_size=2, accelerator="cuda")
    return caught.value.problems


def key_names(block: Any) -> set[str]:
    """All keys of a JSON, whatever their depth."""
    parts = block.items() if isinstance(block, dict) else ()
    return {name for key, value in parts for name in (key, *key_names(value))}


# ---- cases from the field


def test_the_cases_are_all_there():
    assert len(CASES) == 39
    assert {case["expect"]["status"] for case in CASES.values()} == {0, 2}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["expect"]["status"] == 0])
def test_a_json_from_the_field_is_accepted(tmp_path, name):
    expect = CASES[name]["expect"]
    ds, lines, *_ = resolved(written(tmp_path, CASES[name]["json"]))
    report = ds.explain()
    aside = [line for line in report if line.startswith("set aside, without effect here: ")]
    assert len(aside) == bool(ds.set_aside)  # one line, whatever the number of keys
    assert expect.get("set_aside", "") in "".join(aside)
    for key, value in expect.get("optimizer", {}).items():
        assert ds.optimizer.params[key] == value
    text = "\n".join([*lines, *report])
    assert expect.get("planned_with", "") in text
    if name not in TRAINED:
        assert expect.get("printed", "") in text


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["expect"]["status"] == 2])
def test_a_json_from_the_field_is_refused(tmp_path, name):
    with pytest.raises(UserError) as caught:
        resolved(written(tmp_path, CASES[name]["json"]))
    assert CASES[name]["expect"].get("message", "") in "\n".join(caught.value.problems)


BROUGHT = """{
  // from a language model
  train_micro_batch_size_per_gpu: 2,
  # hash
  "_note": "ours", "fp8": {"enabled": true},
  "steps_per_print": Infinity
  "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "bias_correction": true, "torch_adam": true}},
  "amp": {"enabled": false}, "wandb": {"enabled": false, "project": "x"}, "elasticity": {"enabled": false},
  "prescale_gradients": true, "gradient_predivide_factor": 2.0, "communication_data_type": null,
  "activation_checkpointing": {"partition_activations": true, "cpu_checkpointing": true},
  "aio": {"block_size": 1048576}, "checkpoint": {"tag_validation": "Warn"}, "bfloat16": {"enabled": false},
  "zero_optimization": {
    "stage": 3, "sub_group_size": 0, "max_live_parameters": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 0,
    "param_persistence_threshold": 0, "gather_16bit_weights_on_model_save": true,
    "zero_allow_untested_optimizer": true, "offload_optimizer": {"device": "none", "nvme_path": null},
  },
}
"""


@pytest.mark.parametrize(
    ("content", "printed"),
    [
        (BROUGHT, ("set aside, without effect here: ", "_note (a comment)", "wandb", "fp8 (neither")),
        (CASES[TRAINED[0]]["json"], ("reduce_bucket_size",)),
        (CASES[TRAINED[1]]["json"], ("warm", "WarmupLR")),
    ],
    ids=["many keys", *TRAINED],
)
def test_a_json_from_the_field_trains(tmp_path, content, printed):
    place = make_place(tmp_path)
    path = written(tmp_path, content)
    run = alone(place, "brought", epochs=1, deepspeed_config=path)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    assert all(text in output for text in printed), output
    assert sum("set aside, without effect" in line for line in output.splitlines()) == (content == BROUGHT)


# ---- set aside, each with its reason


@pytest.mark.parametrize(
    ("blocks", "path", "reason"),
    [
        ({"_comment": "x"}, "_comment", "a comment"),
        ({"//": "x"}, "//", "a comment"),
        ({"# memory": "x"}, "# memory", "a comment"),
        ({"comment2": "x"}, "comment2", "a comment"),
        ({"zero_optimization": {"stage": 1, "__doc": 1}}, "zero_optimization.__doc", "a comment"),
        ({"optimizer": {"type": "Adam", "params": {"_why": ""}}}, "optimizer.params._why", "a comment"),
        ({"gradient_clipping": None}, "gradient_clipping", "null"),
        ({"fp16": None}, "fp16", "null"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": None}}, "zero_optimization.overlap_comm", "null"),
        ({"amp": {"opt_level": "O1"}}, "amp", "off"),
        ({"amp": {"enabled": "auto"}}, "amp", "off"),
        ({"elasticity": {"enabled": False, "max_train_batch_size": 9}}, "elasticity", "off"),
        ({"compression_training": {"layer_reduction": {"enabled": False}}}, "compression_training", "off"),
        ({"compile": {"deepcompile": False}}, "compile", "off"),
        ({"tensor_parallel": {"autotp_size": 1}}, "tensor_parallel", "off"),
        ({"autotuning": {"enabled": True, "fast": False}}, "autotuning", "launcher"),
        ({"fp16": False}, "fp16", "off"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": False}},
            "zero_optimization.offload_optimizer",
            "off",
        ),
        ({"sparse_gradients": False}, "sparse_gradients", "off"),
        ({"steps_per_print": float("inf")}, "steps_per_print", "endless"),
        ({"aio": {"block_size": 1}}, "aio", "asynchronous"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint", "own checkpoints"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last", "own loader"),
        ({"zero_allow_untested_optimizer": True}, "zero_allow_untested_optimizer", "optimizers"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer", "torch's"),
        ({"bf16": {"enabled": False, "loss_scale": 0}}, "bf16.loss_scale", "no loss scale"),
        ({"fp16": {"enabled": False, "loss_scale": "dynamic"}}, "fp16.loss_scale", "switched off"),
        ({"fp16": {"enabled": False, "opt_level": "O1"}}, "fp16.opt_level", "switched off"),
        ({"vocabulary_size": 50257}, "vocabulary_size", "language models"),
        ({"disable_fused_adam": True}, "disable_fused_adam", "neither DeepSpeed nor dsyolo"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing", "recompute"),
        (
            {"activation_checkpointing": {"recompute": "blocks", "number_checkpoints": 4}},
            "activation_checkpointing.number_checkpoints",
            "recompute says",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
            "ZeRO 3 alone",
        ),
        (
            {"zero_optimization": {"stage": 2, "max_live_parameters": 5}},
            "zero_optimization.stage3_max_live_parameters",
            "ZeRO 3 alone",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "nvme_path": "/no"}}},
            "zero_optimization.offload_optimizer.nvme_path",
            'only the device "nvme"',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
            "zero_optimization.offload_optimizer.device",
            "nothing is offloaded",
        ),
    ],
)
def test_what_is_harmless_is_set_aside_with_its_reason(blocks, path, reason):
    before = json.dumps(blocks)
    config = accepted(**blocks)
    assert json.dumps(blocks) == before
    assert [one.path for one in config.set_aside] == [path]
    assert reason in config.set_aside[0].reason
    assert config.explain()[-1] == f"set aside, without effect here: {path} ({config.set_aside[0].reason})"
    if not path.endswith(".device"):  # which is "none" then
        assert path.split(".")[-1] not in key_names(config.source)
    again = check(config.source, world_size=2, accelerator="cuda")
    assert not again.set_aside
    assert again.source == config.source


@pytest.mark.parametrize(
    ("old", "modern"),
    [
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}),
        ({"gradient_clipping": float("inf")}, {"gradient_clipping": 0.0}),
        (
            {"zero_optimization": True, "allgather_size": 4},
            {"zero_optimization": {"stage": 1, "allgather_bucket_size": 4}},
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        ),
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 4}},
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 4}},
        ),
        (
            {"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        ),
    ],
)
def test_an_old_spelling_is_honoured(old, modern):
    config = accepted(**old)
    assert config.source == {**MICRO, **modern}
    assert config == accepted(**modern)


def test_nothing_is_set_aside_in_silence_nor_where_all_is_honoured():
    for path in sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")):
        assert not check(path, world_size=2, accelerator="cuda").set_aside
    config = accepted(
        amp={"enabled": False}, wandb={}, _a=1, zero_optimization={"stage": 1, "round_robin_gradients": True}
    )
    assert config.explain()[-1] == (
        "set aside, without effect here: amp, wandb (off); _a (a comment); zero_optimization.round_robin_gradients "
        "(only speed, in an order of the weights that dsyolo cannot checkpoint)"
    )


def test_every_key_has_a_verdict_and_a_reason():
    def walk(keys: Any) -> None:
        for key in keys.values():
            assert isinstance(key, (JsonKey, JsonSection, SetAside, Refused, Alias))
            if isinstance(key, JsonSection):
                walk(key.keys)
            elif isinstance(key, Alias):
                assert isinstance(keys[key.name], (JsonKey, JsonSection, SetAside))
            elif isinstance(key, SetAside):
                assert key.reason
                assert not key.reason.endswith(".")
            elif isinstance(key, Refused):
                assert key.reason.endswith(".")

    walk(TOP_LEVEL)


# ---- HJSON


@pytest.mark.parametrize(
    "text",
    [
        '{"train_batch_size": 4, // images\n}',
        '{"train_batch_size": 4,}',
        "{'train_batch_size': 4}",
        "train_batch_size: 4",
        "{\n  train_batch_size: 4\n  zero_optimization: {stage: 1}\n  optimizer: {\n    type: AdamW\n  }\n}",
        '{/* all */ "train_batch_size": 4, "optimizer": {"params": {"lr": 1e-3,},},}',
        '\n{"train_batch_size": 4,\n "steps_per_print": inf\n}',
    ],
)
def test_hjson_is_read_as_deepspeed_reads_it(tmp_path, text):
    assert check(written(tmp_path, text), world_size=2, accelerator="cpu").global_batch == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{\n // twice\n a: 1\n a: 2\n}", "a: given twice. Leave one out."),
        ("{\n # big\n train_batch_size: " + "9" * 30 + "\n}", "has 30 digits"),
        ("hello", "line 1, column 1"),
        ("{'a': 1", "line 1, column 2"),
        ("{a: " * 40 + "1" + "}" * 40, "nested more than 20 deep"),
        ("{a:\n" * 2000, "nested more than 20 deep"),
    ],
)
def test_what_is_neither_has_the_message_of_json(tmp_path, text, problem):
    assert problem in "\n".join(read_json(written(tmp_path, text)).problems)


# ---- remedies


@pytest.mark.parametrize(
    "blocks",
    [
        {"train_batch_size": 7},
        {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1},
        {"gradient_acumulation_steps": 3},
        {"zero": {"stage": 2}},
        {"lr": 0.5},
        {"max_grad_norm": 3.0},
        {"gradient_checkpointing": True},
        {"offload_optimizer": {"device": "cpu"}, "zero_optimization": {"stage": 2}},
        {"fp16": {"fp16": True}, "zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2, "gradient_clipping": 0.5}},
        {"zero_optimization": {"stage": "2"}},
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": 15099494.4}},
        {"bf16": {"enabled": "True,"}, "zero_optimization": {"stage": 2}},
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"data_types": {"grad_accum_dtype": "bf16"}},
        {"zero_optimization": {"stage": 2}, "pipeline": {"stages": 2}},
        {"torch_autocast": {"enabled": True}, "zero_optimization": {"stage": 1}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"bf16": True, "zero_optimization": {"stage": 1}},
        {"elasticity": {"enabled": True}},
        {"optimizer": {"type": "Adam", "params": {"bias_correction": False}}},
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        {"pipeline": {"stages": 1, "activation_checkpoint_interval": 1}},
    ],
    ids=json.dumps,
)
def test_the_remedies_of_a_message_are_accepted(blocks):
    content: Any = {**MICRO, **copy.deepcopy(blocks)}
    for problem in refusal(content):
        content = mended(content, problem)
    check(content, world_size=2, accelerator="cuda")


def mended(content: dict[str, Any], problem: str) -> dict[str, Any]:
    """The JSON after the remedy of a problem, which neither drops nor reverses a value that has another place."""
    where, _, text = problem.partition(": ")
    path = where.removesuffix(".enabled") if "Set zero_optimization.stage" in text else where
    result = copy.deepcopy(content)
    if match := re.search(r"stage to (\d)", text):
        result.setdefault("zero_optimization", {})["stage"] = int(match[1])
        return result
    *above, name = path.split(".")
    block = result
    for key in above:
        block = block[key]
    value = block.pop(name) if name in block else None
    if match := re.search(r"Its place is ([\w.]+\w)", text):
        put(result, match[1], value)
    elif match := re.search(r"Did you mean (\w+)\?", text) or re.search(r"Write (gradient_clipping)\.", text):
        block[match[1]] = value
    elif match := re.search(r"Write (\w+\.\w+)\.$", text):
        put(result, match[1], value)
    elif match := re.search(
        r"(?:Write|set) (activation_checkpointing)(?:,|:| to)* ({.*})", text, re.IGNORECASE
    ):
        result[match[1]] = json.loads(match[2])
    elif (match := re.search(r'Write ({"enabled": true})', text)) or (
        match := re.search(r"(?:Write|Set it to|set it to) (\"\w+\"|\d+|true|false)", text)
    ):
        block[name] = json.loads(match[1])
    else:
        assert re.search(r"Leave (it|one) out", text), problem
    return result


def put(content: dict[str, Any], path: str, value: Any) -> None:
    *above, name = path.split(".")
    block = content
    for key in above:
        block = block.setdefault(key, {})
    block[name] = value


# ---- DeepSpeed itself


def test_deepspeed_takes_what_it_gets_of_an_accepted_json(tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    for name, case in CASES.items():
        if case["expect"]["status"] == 0 and name not in ("WarmupLR", "WarmupDecayLR with auto"):
            ds = check(read_source(written(tmp_path, case["json"])), world_size=1, accelerator="cpu")
            theirs = Theirs(ds.deepspeed_json(2 * 10**6, cpu=True))
            assert theirs.zero_optimization_stage == ds.zero_stage, name
