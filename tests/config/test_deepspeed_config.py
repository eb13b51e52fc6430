"""The DeepSpeed JSON: keys, arithmetic, combinations, and what DeepSpeed gets of it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed import schema as ds_keys
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS
from dsyolo.config.deepspeed.config import MAX_BUCKET_ELEMENTS, DeepSpeedConfig, check
from dsyolo.config.deepspeed.optimizer_table import OPTIMIZERS
from dsyolo.config.recipe import RECIPE_KEYS
from dsyolo.config.run_config import RUN_KEYS
from dsyolo.models.registry import meta_network

LAYERS = meta_network("yolov5n").has_parameters

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}


def resolve(config: Any, world_size: int = 1, accelerator: str = "cuda", **more: Any) -> DeepSpeedConfig:
    return check(config, world_size=world_size, accelerator=accelerator, **more)


def problems_of(config: Any, world_size: int = 1, accelerator: str = "cuda", **more: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        resolve(config, world_size, accelerator, **more)
    return caught.value.problems


def with_batch(**blocks: Any) -> dict[str, Any]:
    return {"train_batch_size": 64, **blocks}


# ---- the house form


def test_the_example_of_the_design(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds_configs").mkdir()
    config = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 16,
        "grandient_accumulation_steps": 2,
        "pipeline": {"stages": 2},
        "zero_optimization": {"stage": 2},
    }
    Path("ds_configs/zero2.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        resolve("ds_configs/zero2.json", 6)
    assert str(caught.value) == (
        "ds_configs/zero2.json cannot be used on 6 ranks:\n"
        "  train_batch_size: 256 given, but 16 per GPU x 2 accumulation x 6 ranks = 192. Set it to 192, or "
        "leave it out.\n"
        "  grandient_accumulation_steps: unknown key. Did you mean gradient_accumulation_steps?\n"
        "  pipeline.stages: 2 given, but DeepSpeed pipelines need ZeRO 0 or 1, and zero_optimization.stage is 2. "
        "Set it to 1, or remove pipeline."
    )


# ---- files that are complete


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shipped_files(path: Path, world_size: int) -> None:
    accelerator = "cuda" if path.stem == "fp16" else "cpu"
    stages = 2 if path.stem.startswith("pipeline2") else 1
    config = resolve(path, world_size * stages, accelerator, layers=LAYERS)
    assert (config.stages, config.dp_size) == (stages, world_size)
    # the demo's data set is small: it takes small batches, and no accumulation; a pipeline wants many
    expected = {
        "demo": (16, 16 // world_size, 1),
        "pipeline2": (64, 8, 8 // world_size),
    }.get(path.stem, (64, 16, 4 // world_size))
    assert (config.global_batch, config.micro_batch, config.accumulation) == expected
    assert config.gradient_clipping == 10.0
    digit = path.stem[4] if path.stem.startswith("zero") else None
    assert digit is None or config.zero_stage == int(digit)
    assert ("offload" in path.stem) == (config.parallelism.offload.optimizer == "cpu")
    assert ("nvme" in path.stem) == (config.parallelism.offload.optimizer == "nvme")
    assert json.loads(path.read_text()).keys() >= {"optimizer", "zero_optimization", "gradient_clipping"}


def test_shipped_files_are_all_there() -> None:
    names = "zero0 zero1 zero2 zero3 zero1_offload zero2_offload zero3_offload zero2_nvme zero3_nvme fp32 zero2_fp32 "
    names += "bf16 fp16 adamw adamw_offload adamw_nvme recompute"
    assert {path.stem for path in FILES} >= set(names.split())
    by_name = {path.stem: resolve(path, 2) for path in FILES}
    assert {name: by_name[name].precision.name for name in ("zero2", "fp32", "bf16", "fp16")} == {
        "zero2": "autocast_bf16",
        "fp32": "fp32",
        "bf16": "bf16",
        "fp16": "fp16",
    }
    assert by_name["zero1"].optimizer.params == {
        "lr": 0.01,
        "momentum": 0.937,
        "nesterov": True,
        "weight_decay": 0.0005,
    }
    assert by_name["adamw"].optimizer.type == "AdamW"


# ---- batch arithmetic


@pytest.mark.parametrize(
    ("given", "world_size", "triple"),
    [
        ((64, 16, 2), 2, (64, 16, 2)),
        ((64, 16, None), 2, (64, 16, 2)),
        ((64, None, 2), 2, (64, 16, 2)),
        ((None, 16, 2), 2, (64, 16, 2)),
        ((64, None, None), 2, (64, 32, 1)),
        ((None, 16, None), 2, (32, 16, 1)),
    ],
)
def test_batch_is_derived_as_deepspeed_does(
    given: tuple[Any, ...], world_size: int, triple: tuple[int, ...]
) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = resolve({k: v for k, v in zip(keys, given, strict=True) if v is not None}, world_size)
    assert (config.global_batch, config.micro_batch, config.accumulation) == triple
    assert [config.deepspeed_json(10**6, cpu=True)[key] for key in keys] == list(triple)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "train_batch_size: missing, and so is train_micro_batch_size_per_gpu. Give one of them"),
        ({"gradient_accumulation_steps": 2}, "train_batch_size: missing"),
        ({"train_batch_size": 100}, "16 per GPU x 1 accumulation x 6 ranks = 96. Set it to 96 or 102."),
        (
            {"train_batch_size": 5},
            "6 ranks need 6 at least, one image each. Set it to 6, or use 1 or 5 ranks.",
        ),
        ({"train_batch_size": 64}, "Set it to 60 or 66. Or use 1, 2, 4 or 8 ranks."),
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16},
            "64 given, but 16 per GPU x 6 ranks = 96 already. Set it to 96, or use 1, 2, 4 or 8 ranks",
        ),
        (
            {"train_batch_size": 60, "train_micro_batch_size_per_gpu": 16},
            "Set it to 96, or train_micro_batch_size_per_gpu to 10.",
        ),
    ],
)
def test_wrong_arithmetic(config: dict[str, Any], problem: str) -> None:
    (line,) = problems_of(config, 6)
    assert problem in line


def test_a_run_that_goes_on_keeps_its_global_batch_on_other_ranks() -> None:
    def triple(
        saved: int, world_size: int, train=None, micro=None, steps=None, stages=1
    ) -> tuple[int, int, int]:
        given = dict(zip(BATCH_KEYS, (train, micro, steps), strict=True))
        source = {key: value for key, value in given.items() if value is not None}
        source["pipeline"] = {"stages": stages}
        config = check(source, world_size=world_size, accelerator="cpu", saved_batch=saved)
        return config.global_batch, config.micro_batch, config.accumulation

    assert triple(48, 8, train=48) == (48, 6, 1)
    assert triple(48, 6, train=48) == (48, 8, 1)
    assert triple(48, 6, train=48, steps=4) == (48, 2, 4)
    assert triple(48, 8, train=48, steps=4) == (48, 6, 1)  # as given it would be 1.5 per GPU
    assert triple(48, 6, train=48, micro=4) == (48, 4, 2)
    assert triple(48, 8, train=48, micro=4) == (48, 3, 2)  # 4 per GPU on 8 ranks leaves 1.5 steps
    assert triple(48, 8, train=48, micro=3, steps=2) == (48, 3, 2)
    assert triple(48, 6, train=48, micro=3, steps=2) == (48, 2, 4)
    assert triple(48, 1, train=48, micro=3, steps=2) == (48, 3, 16)
    assert triple(48, 6, micro=4) == (48, 4, 2)  # where the JSON alone would mean 24
    assert triple(48, 8, train=48, micro=4, stages=2) == (48, 4, 3)
    assert triple(48, 6, train=36) == (
        36,
        6,
        1,
    )  # of another run, which is refused when the checkpoint is read
    with pytest.raises(UserError) as caught:
        triple(64, 6, train=64, micro=4)
    (line,) = caught.value.problems
    assert line == (
        "train_batch_size: 64 when it was saved, and 6 ranks do not divide it. Use 1, 2, 4 or 8 ranks."
    )
    with pytest.raises(UserError, match=r"3 data-parallel ranks do not divide it. Use 2, 4 or 8 ranks"):
        triple(64, 6, micro=4, stages=2)


# ---- keys and types


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key. Did you mean zero_optimization?"),
        ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag: unknown key. Did you mean stage?"),
        ({"bf16": {"enable": True}}, "bf16.enable: unknown key. Did you mean enabled?"),
        ({"fp16": {"loss_scal": 0}}, "fp16.loss_scal: unknown key. Did you mean loss_scale?"),
        ({"torch_autocast": {"dtyp": "bf16"}}, "torch_autocast.dtyp: unknown key. Did you mean dtype?"),
        ({"optimizer": {"typ": "SGD"}}, "optimizer.typ: unknown key. Did you mean type?"),
        (
            {"optimizer": {"type": "SGD", "params": {"momentm": 0.9}}},
            "optimizer.params.momentm: unknown key. Did you mean momentum?",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"betas": [0, 0]}}},
            "optimizer.params.betas: it belongs to Adam and AdamW. Leave it out, or set optimizer.type.",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"nesterov": True}}},
            "optimizer.params.nesterov: it belongs to SGD.",
        ),
        (
            {"optimizer": {"type": "Lamb", "params": {"lr": 1}}},
            'optimizer.type: "Lamb" given, but it must be "SGD" or "Adam" or "AdamW".',
        ),
        ({"max_grad_norm": 1}, "it is Hugging Face's. Write gradient_clipping."),
        ({"gradient_checkpointing": True}, 'Write activation_checkpointing: {"recompute": "blocks"}.'),
        ({"zero": {"stage": 2}}, "zero: unknown key. Did you mean zero_optimization?"),
        ({"deepspeed": {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}},
         "deepspeed: unknown block, but fp16 and zero_optimization in it belong to the top level."),
        ({"fp16": True}, 'fp16: true given, but it must be a block of keys, in braces. Write {"enabled": true}.'),
        ({"optimizer": {"type": "FusedAdam"}}, 'Did you mean "Adam"?'),
        ({"lr": 0.1}, "lr: unknown key here. Its place is optimizer.params.lr."),
        ({"pin_memory": True}, "offload_optimizer.pin_memory or zero_optimization.offload_param.pin_memory."),
        ({"fp16": {"fp16": True}}, "fp16.fp16: unknown key. Write fp16.enabled."),
        ({"zero_optimization": {"stage": 1, "gradient_clipping": 1}},
         "Its place is gradient_clipping, at the top level."),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 15099494.4}}, "Write 15099494."),
        ({"bf16": {"enabled": "True,"}}, 'bf16.enabled: "True," given, but it must be true or false. Write true without'),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
         "cpu_offload: true given, but so is offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
         "prefetch_bucket_size: 1 given, and so is stage3_prefetch_bucket_size"),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "Adam corrects its bias here"),
        (
            {"optimizer": {"type": "SGD", "params": {"max_grad_norm": 1}}},
            "an optimizer does not clip. Set gradient_clipping",
        ),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0, "nesterov": True}}}, "Nesterov needs momentum"),
        ({"optimizer": {"type": "SGD", "params": {"dampening": 0.1}}}, "optimizer.params.dampening: 0.1 given"),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "bias_correction: false given"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "amsgrad: true given"),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "must be two numbers"),
        ({"overlap_comm": True}, "overlap_comm: unknown key here. Its place is zero_optimization.overlap_comm."),
        ({"weight_decay": 0}, "weight_decay: unknown key here. Its place is optimizer.params.weight_decay."),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage: \"2\" given, but it must be 0, 1, 2 or 3. "
         "Write 2 without quotes."),
        ({"zero_optimization": 2}, "zero_optimization: 2 given, but it must be a block of keys"),
        ({"zero_optimization": {"allgather_bucket_size": 7}}, "an even whole number of at least 2"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "must be a whole number of at least 1"),
        ({"gradient_clipping": -1}, "gradient_clipping: -1 given, but it must be a number of at least 0."),
        ({"gradient_clipping": True}, "gradient_clipping: true given"),
        ({"steps_per_print": 0}, "steps_per_print: 0 given, but it must be a number above 0."),
        ({"data_types": {"param_dtype": "int8"}}, '"fp32" or "fp16" or "bf16"'),
        ({"activation_checkpointing": {"recompute": True}}, '"none", "blocks" or a budget in GiB like "4.5GiB"'),
        ({"activation_checkpointing": {"recompute": "4GB"}}, 'a budget in GiB like "4.5GiB"'),
        ({"activation_checkpointing": {"recompute": "0GiB"}}, 'a budget in GiB like "4.5GiB"'),
        ({"activation_checkpointing": {"cpu_checkpointing": 1}}, "must be true or false"),
        ({"recompute": "blocks"}, "the run configuration owns it. Leave it out and give --recompute."),
    ],
)  # fmt: skip
def test_keys_and_types(block: dict[str, Any], problem: str) -> None:
    (line,) = problems_of(with_batch(**block))
    assert problem in line


def test_bad_batch_value_is_reported_once() -> None:
    (line,) = problems_of({"train_batch_size": "16"})
    assert line == (
        'train_batch_size: "16" given, but it must be a whole number of at least 1. Write 16 without quotes.'
    )


def test_numbers_with_an_exponent_are_whole() -> None:
    resolve(with_batch(zero_optimization={"stage": 1, "reduce_bucket_size": 5e8}))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n  "train_batch_size": 64, // images\n', "line 2, column 27: "),
        ('{\n  "train_batch_size": 64, // images\n', "JSON has no comments: leave it out."),
        ('{"train_batch_size": 64,', "line 1, column 25: "),
        ('{"train_batch_size": 64,}]', "Leave out"),
        ("{'train_batch_size': 64", 'Strings need double quotes: "stage".'),
        ('{"bf16": {"enabled": True}}', "line 1, column 22: Expecting value. Write true, false or null."),
        ('{"train_batch_size": NaN}', "NaN is not JSON."),
        (f'{{"train_batch_size": {"9" * 400}}}', "99999999... has 400 digits"),
        (f'{{"train_batch_size": {"9" * 5000}}}', "99999999... has 5000 digits"),
        (f'{{"train_batch_size": {"[" * 30}1{"]" * 30}}}', "nested more than 20 deep"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("[]", "must be an object"),
        ("", "line 1, column 1: Expecting value."),
    ],
)
def test_syntax(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    (line,) = problems_of(path)
    assert problem in line


def test_keys_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        '{"train_batch_size": 64, "train_batch_size": 32, "fp16": {"enabled": true, "enabled": false}}'
    )
    twice = ("train_batch_size: given twice. Leave one out.", "fp16.enabled: given twice. Leave one out.")
    assert problems_of(path) == twice


def test_missing_and_binary_files(tmp_path: Path) -> None:
    (line,) = problems_of(tmp_path / "no.json")
    assert line == "cannot be read: No such file or directory. Check --deepspeed_config."
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    (line,) = problems_of(tmp_path / "b.json")
    assert "not a text file" in line


# ---- who owns a knob


@pytest.mark.parametrize("key", ["epochs", "imgsz", "seed", "mosaic", "warmup_epochs", "ema_decay"])
def test_keys_of_the_run_configuration_are_refused(key: str) -> None:
    assert key in RUN_KEYS | RECIPE_KEYS
    (line,) = problems_of(with_batch(**{key: 1}))
    assert line == f"{key}: the run configuration owns it. Leave it out and give --{key}."


def test_no_knob_has_two_owners() -> None:
    usable = {key for key, kind in ds_keys.TOP_LEVEL.items() if not isinstance(kind, ds_keys.Refused)}
    usable |= {key for facts in OPTIMIZERS.values() for key in facts.keys}
    assert not usable & (RUN_KEYS | RECIPE_KEYS)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"wandb": {"enabled": True}}, "--wandb"),
        ({"gradient_allreduce_op": "sum"}, "plain mean"),
        ({"amp": {"enabled": True}}, "Apex"),
        ({"sparse_attention": {"mode": "fixed"}}, "removed"),
        ({"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}}, "removed"),
        ({"elasticity": {"enabled": True}}, "removed"),
        ({"tensor_parallel": {"autotp_size": 2}}, "convolutions"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "4-D gradients"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "compiled op"),
    ],
)  # fmt: skip
def test_refused_with_a_reason(block: dict[str, Any], reason: str) -> None:
    (line,) = problems_of(with_batch(**block))
    assert reason in line


@pytest.mark.parametrize(
    "block",
    [
        {"prescale_gradients": False, "gradient_predivide_factor": 1, "gradient_allreduce_op": "mean"},
        {"wandb": {"enabled": False}, "autotuning": {"enabled": False}, "zero_allow_untested_optimizer": True},
        {"zero_optimization": {"stage": 1, "zero_quantized_weights": False, "offload_optimizer": None}},
        {"fp16": {"enabled": False}, "bf16": {"enabled": False}, "torch_autocast": AUTOCAST},
        {"flops_profiler": {"enabled": True, "profile_step": 5}, "wall_clock_breakdown": True},
        {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}, "csv_monitor": {"enabled": True}},
    ],
)  # fmt: skip
def test_values_that_turn_a_refused_key_off_are_let_through(block: dict[str, Any]) -> None:
    config = resolve(with_batch(**block))
    aside = {path for path, _ in config.set_aside}
    assert config.deepspeed_json(10**6, cpu=False).keys() >= block.keys() - aside
    assert not aside & config.source.keys()


# ---- combinations


@pytest.mark.parametrize(
    ("precision", "stage"),
    [({"fp16": {"enabled": True}}, 1), ({"torch_autocast": {**AUTOCAST, "dtype": "fp16"}}, 0)],
)
def test_fp16_is_for_devices_that_have_it(precision: dict[str, Any], stage: int) -> None:
    source = with_batch(**precision, zero_optimization={"stage": stage})
    assert resolve(source).precision.name in ("fp16", "autocast_fp16")
    (line,) = problems_of(source, accelerator="cpu")
    autocast = 'Write "torch_autocast": {"enabled": true, "dtype": "bfloat16"} in the place of fp16.'
    assert line.endswith(autocast if "fp16" in precision else 'Write "bfloat16".')


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"bf16": {"enabled": True}, "torch_autocast": AUTOCAST}, "and so is bf16.enabled"),
        ({"bf16": {"enabled": True}}, "Set zero_optimization.stage to 1"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.dtype: missing"),
        (
            {"torch_autocast": {**AUTOCAST, "dtype": "fp16"}, "zero_optimization": {"stage": 1}},
            "DeepSpeed never lowers its loss scale",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "it needs stage 1, 2 or 3, and stage 0 is given",
        ),
        ({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}, "it needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"nvme_path": "."}}}, "device: missing"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            '"none" or "cpu" or "nvme"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.nvme_path: missing",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": 5}}},
            "offload_param.nvme_path: 5 given, but it must be the path of a folder",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/no/where"},
                }
            },
            'offload_optimizer.nvme_path: "/no/where" given, but there is no such folder',
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/proc"},
                }
            },
            "written",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_param": {"device": "nvme", "nvme_path": "."}}},
            "needs stage 3",
        ),
        ({"data_types": {"param_dtype": "bf16"}}, "weights are fp32 here"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "at ZeRO 0"),
        (
            {
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "zero_optimization": {"stage": 1},
            },
            "Leave it out, or set zero_optimization.stage to 2.",
        ),
        ({"data_types": {"buffer_dtype": "bf16"}}, "the statistics of BatchNorm stay fp32"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True, "recompute": "none"}},
            'Set recompute to "blocks"',
        ),
        (
            {"pipeline": {"stages": 2}, "activation_checkpointing": {"recompute": "1GiB"}},
            'keeps the activations of several micro-batches. Set it to "blocks" or "none".',
        ),
        ({"pipeline": {"stages": 3}}, "not a multiple of it. Set it to one of 1, 2, 4."),
        ({"pipeline": {"stages": 2, "partition": [3, 9]}}, "2 stages need 1 cuts"),
        ({"pipeline": {"stages": 2, "partition": [25]}}, "the network has 25 layers"),
        ({"pipeline": {"stages": 4, "partition": [3, 11, 13]}}, "layers 11 to 12 would have no parameters"),
        (
            {"pipeline": {"stages": 2, "partition": "best"}},
            '"balanced" or an increasing list of layer indices',
        ),
    ],
)
def test_combinations_that_cannot_run(block: dict[str, Any], problem: str) -> None:
    assert any(problem in line for line in problems_of(with_batch(**block), 4, layers=LAYERS))


def test_a_stage_needs_a_layer_with_parameters() -> None:
    lines = problems_of(with_batch(pipeline={"stages": 24}), 24, layers=LAYERS)
    assert any("the network has 19 layers with parameters" in line for line in lines)
    assert resolve(with_batch(pipeline={"stages": 4}), 4, layers=LAYERS).stages == 4


def test_pipeline_divides_the_ranks_of_a_batch() -> None:
    block = {"stages": 2, "partition": [9]}
    given = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "pipeline": block}
    config = resolve(given, 4, layers=LAYERS)
    assert (config.stages, config.parallelism.partition, config.dp_size, config.accumulation) == (
        2,
        (9,),
        2,
        2,
    )
    assert "pipeline" not in config.deepspeed_json(10**6, cpu=True)
    (line,) = problems_of({**given, "train_batch_size": 60}, 4)
    assert "16 per GPU x 1 accumulation x 2 data-parallel ranks = 32" in line


@pytest.mark.parametrize(
    ("given", "recompute"),
    [("none", "none"), ("blocks", "blocks"), ("4.5GiB", 4831838208), ("2 GiB", 2**31), ("0.001GiB", 1073741)],
)
def test_recompute_of_the_json_or_of_the_command_line(given: str, recompute: str | int) -> None:
    block = {"recompute": given, "partition_activations": False, "number_checkpoints": None}
    from_json = resolve(with_batch(activation_checkpointing=block))
    assert (from_json.parallelism.recompute, from_json.parallelism.offload.activations) == (recompute, False)
    assert "activation_checkpointing" not in from_json.deepspeed_json(10**6, cpu=True)
    assert resolve(with_batch(), recompute=given).parallelism.recompute == recompute
    offloaded = {"activation_checkpointing": {"cpu_checkpointing": True}}
    lines = resolve(with_batch(**offloaded), recompute="blocks").explain()
    assert lines[-1] == "recompute: all blocks, their inputs in host memory"
    if given != "none":
        (line,) = problems_of(with_batch(activation_checkpointing=block), recompute="blocks")
        assert line.endswith("given, and so is --recompute. Leave one out.")


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"type": "OneCycle", "params": {"cycle_min_lr": 1, "x": 2}}, 'scheduler.type: "OneCycle" given'),
        ({"type": "OneCycle"}, "Leave scheduler out; the nearest here is --schedule cosine with --warmup_epochs."),
        ({"type": "CosineAnnealingLR"}, "the nearest here is --schedule cosine with --lrf."),
        ({"type": "constant"}, "the nearest here is --lrf 1."),
        ({"type": "LRRangeTest"}, "optimizer.params.lr"),
        ({"type": "StepLR"}, "--schedule"),
        ({"type": "warmup_lr"}, "Did you mean WarmupLR?"),
        ({"type": "WarmupCosine"}, "Did you mean WarmupCosineLR?"),
        ({"type": 3}, "scheduler.type: 3 given, but it must be"),
        ({"params": {"warmup_num_steps": 3}}, "scheduler.type: missing."),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "must be a whole number of at least 1"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 2.5}}, "must be a whole number of at least 1"),
        ({"type": "WarmupLR", "params": {"warmup_type": "cosine"}}, 'must be "log" or "linear"'),
        ({"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0]}}, "must be a number of at least 0"),
        ({"type": "WarmupLR", "params": {"warmup_step": 5}}, "scheduler.params.warmup_step: unknown key."),
        ({"type": "WarmupLR", "params": {"total_num_steps": 5}}, "it belongs to WarmupDecayLR and WarmupCosineLR"),
        ({"type": "WarmupLR", "params": {"last_batch_iteration": 7}}, "a resumed run continues at its own step"),
        ({"type": "WarmupDecayLR"}, 'scheduler.params.total_num_steps: missing, and WarmupDecayLR needs it.'),
        ({"type": "WarmupCosineLR", "params": {"total_num_steps": 5, "cos_min_ratio": 2}}, "a number from 0 to 1"),
        ({"typ": "WarmupLR", "type": "WarmupLR"}, "scheduler.typ: unknown key. Did you mean type?"),
        ([], "scheduler: [] given, but it must be a block of keys"),
    ],
)  # fmt: skip
def test_schedulers_that_cannot_run(block: Any, problem: str) -> None:
    (line,) = problems_of(with_batch(scheduler=block))
    assert problem in line


def test_schedulers_that_run() -> None:
    params = {"warmup_num_steps": 1e2, "last_batch_iteration": -1}
    got = resolve(with_batch(scheduler={"type": "WarmupLR", "params": params}))
    assert got.scheduler is not None
    assert got.scheduler.params == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": None,
        "warmup_num_steps": 100,
        "warmup_type": "log",
    }
    assert "scheduler" not in got.deepspeed_json(10**6, cpu=True)  # the engine sets the rate
    for nothing in (None, {}):
        assert resolve(with_batch(scheduler=nothing)).scheduler is None


def test_gradients_under_autocast_are_sent_in_the_weights_type() -> None:
    block = {"torch_autocast": AUTOCAST, "communication_data_type": "bf16"}
    assert resolve(with_batch(**block)).sent_type == "bf16"  # ZeRO 0 heeds it
    (line,) = problems_of(with_batch(**block, zero_optimization={"stage": 2}))
    assert line.startswith('communication_data_type: "bf16" given, but under torch_autocast ZeRO 2 sends')
    resolve(with_batch(**block | {"communication_data_type": "fp32"}, zero_optimization={"stage": 2}))


def test_adam_is_what_deepspeed_makes_of_it() -> None:
    adam = resolve(with_batch(optimizer={"type": "Adam", "params": {"lr": 0.1}}))
    assert (adam.optimizer.type, adam.optimizer.params["weight_decay"]) == ("AdamW", 0.0)
    for kind in ("Adam", "AdamW"):  # where DeepSpeed takes torch's class, it takes its default too
        block = {"type": kind, "params": {"torch_adam": True}}
        assert resolve(with_batch(optimizer=block)).optimizer.weight_decay == 0.01
        block["params"] |= {"weight_decay": 0.3}
        assert resolve(with_batch(optimizer=block)).optimizer.weight_decay == 0.3
        block["params"] = {"torch_adam": False, "bias_correction": True, "amsgrad": False}
        assert resolve(with_batch(optimizer=block)).optimizer.weight_decay == 0.0
    still = resolve(with_batch(optimizer={"type": "SGD", "params": {"momentum": 0}})).optimizer
    assert (still.params["nesterov"], still.momentum, still.states_per_param) == (False, 0.0, 0)
    coupled = resolve(
        with_batch(optimizer={"type": "adam", "params": {"adam_w_mode": False, "torch_adam": True}})
    )
    assert (coupled.optimizer.type, coupled.optimizer.params) == (
        "Adam",
        {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    )


# ---- what DeepSpeed gets


def test_what_is_silent_is_resolved_and_what_is_given_stays() -> None:
    given = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1234, "offload_param": {"device": "cpu"}},
        "steps_per_print": 5,
    }
    before = json.dumps(given)
    config = resolve(given, 2)
    out = config.deepspeed_json(7_235_389, cpu=True)
    assert json.dumps(given) == before
    assert "optimizer" not in out
    assert (out["gradient_clipping"], config.gradient_clipping) == (10.0, 10.0)
    assert (out["zero_allow_untested_optimizer"], out["zero_force_ds_cpu_optimizer"]) == (True, False)
    assert (out["steps_per_print"], out["train_batch_size"]) == (5, 16)
    assert out["zero_optimization"]["reduce_bucket_size"] == 1234
    assert out["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    json.dumps(out, allow_nan=False)


@pytest.mark.parametrize("num_parameters", [1001, 1_872_157, 140_794_780])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_sized_to_the_model(num_parameters: int, stage: int) -> None:
    zero = resolve(with_batch(zero_optimization={"stage": stage})).deepspeed_json(num_parameters, cpu=False)
    zero = zero["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        assert zero[key] <= min(max(num_parameters + 1, 2**16), MAX_BUCKET_ELEMENTS)
        assert zero[key] % 2 == 0  # DeepSpeed asserts it
    assert ("stage3_prefetch_bucket_size" in zero) == (stage == 3)
    if stage == 3:
        assert zero["stage3_prefetch_bucket_size"] <= max(num_parameters, 2**16)
        assert zero["stage3_param_persistence_threshold"] >= 1280  # the widest BatchNorm of any variant


@pytest.mark.parametrize(("num_ranks", "summed_on_all"), [(2, False), (8, True)])
def test_gradients_go_to_their_owners_while_shares_are_large(num_ranks: int, summed_on_all: bool) -> None:
    def zero(**block: Any) -> dict[str, Any]:
        source = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2, **block}}
        return resolve(source, num_ranks).deepspeed_json(1_872_157, cpu=False)["zero_optimization"]

    key = "use_multi_rank_bucket_allreduce"
    assert zero()[key] == summed_on_all
    assert zero(**{key: not summed_on_all})[key] != summed_on_all  # what the JSON says stands


def test_explain() -> None:
    config = resolve(FILES[[path.stem for path in FILES].index("zero2_offload")], 2)
    assert config.explain() == [
        "batch: 64 images per step = 16 per GPU x 2 accumulation x 2 ranks",
        "precision: convolutions in bf16 (autocast); weights, gradients, BatchNorm, loss, optimizer and EMA in fp32",
        "ZeRO 2: optimizer states and gradients sharded; offload: optimizer on cpu",
        "optimizer: SGD, lr 0.01, momentum 0.937, nesterov True, weight_decay 0.0005",
        "weight decay: 0.0005 (weight_decay x 64 / 64 images), on the weights of convolutions and other matrices; "
        "none on norms and biases",
        "gradient norm: clipped at 10",
    ]
    bf16 = resolve(
        {
            "train_batch_size": 8,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "gradient_clipping": 0,
        }
    ).explain()
    assert bf16[1].startswith(
        "precision: convolutions and weights in bf16, gradients summed in bf16; master weights, "
    )
    assert bf16[-1] == "gradient norm: not clipped"


# ---- the tables against the installed package, read and not imported


def deepspeed_source(name: str) -> ast.Module:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("DeepSpeed is not installed")
    return ast.parse((Path(spec.submodule_search_locations[0]) / name).read_text(encoding="utf-8"))


def fields_of(module: str, class_name: str) -> set[str]:
    """Keys of a pydantic model: fields, and their aliases."""
    tree = deepspeed_source(module)
    (model,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    fields = [node for node in model.body if isinstance(node, ast.AnnAssign)]
    calls = [node.value for node in fields if isinstance(node.value, ast.Call)]
    aliases = {word.value.value for call in calls for word in call.keywords if word.arg == "alias"}  # type: ignore[attr-defined]
    return {node.target.id for node in fields} | aliases  # type: ignore[union-attr]


def constants_of(module: str) -> dict[str, Any]:
    tree = deepspeed_source(module)
    pairs = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return {t.id: v.value for t, v in pairs if isinstance(t, ast.Name) and isinstance(v, ast.Constant)}


@pytest.mark.parametrize(
    ("table", "module", "class_name"),
    [
        (ds_keys.ZERO, "runtime/zero/config.py", "DeepSpeedZeroConfig"),
        (ds_keys.BF16, "runtime/precision_config.py", "DeepSpeedBF16Config"),
        (ds_keys.FP16, "runtime/precision_config.py", "DeepSpeedFP16Config"),
        (ds_keys.OFFLOAD_OPTIMIZER, "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
        (ds_keys.OFFLOAD_PARAM, "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    ],
)
def test_tables_know_every_key_of_deepspeed(table: dict[str, Any], module: str, class_name: str) -> None:
    known = fields_of(module, class_name)
    assert known <= table.keys()
    honoured = (ds_keys.JsonKey, ds_keys.JsonSection, ds_keys.Alias)
    invented = {key for key, kind in table.items() if isinstance(kind, honoured)} - known
    assert not invented


def test_top_level_knows_every_key_of_deepspeed() -> None:
    constants = constants_of("runtime/constants.py")
    names = {
        value for key, value in constants.items() if f"{key}_DEFAULT" in constants and isinstance(value, str)
    }
    inner = {"type", "legacy_fusion", "enabled", "tag_validation", "load_universal", "use_node_local_storage"}
    inner |= {"pipeline_stage", "check_overflow"}
    for table in (ds_keys.FP16, ds_keys.BF16, ds_keys.TORCH_AUTOCAST):
        inner |= table.keys()
    section = ds_keys.TOP_LEVEL["data_types"]
    assert isinstance(section, ds_keys.JsonSection)
    assert names - inner - section.keys.keys() <= ds_keys.TOP_LEVEL.keys()
    removed = [
        node.value
        for node in deepspeed_source("runtime/config.py").body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("_REMOVED_")
    ]
    keys = {key.value for node in removed if isinstance(node, ast.Dict) for key in node.keys}  # type: ignore[union-attr]
    tables = {**ds_keys.TOP_LEVEL, **ds_keys.ZERO}
    assert len(keys) > 10
    assert all(isinstance(tables[key], ds_keys.Refused) for key in keys)  # so never handed on


def test_autocast_keys_are_those_that_deepspeed_reads() -> None:
    constants = constants_of("runtime/constants.py")
    read = {
        value
        for key, value in constants.items()
        if key.startswith("TORCH_AUTOCAST_") and isinstance(value, str)
    }
    read = {value for value in read if "\n" not in value}
    assert constants["TORCH_AUTOCAST"] == "torch_autocast"
    assert set(ds_keys.TORCH_AUTOCAST) == read
    assert constants["GRADIENT_CLIPPING_DEFAULT"] == 1.0  # why we always write the key
