"""Messages for values and keys of a DeepSpeed JSON that are nearly right: no traceback, and no remedy that reverses them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dsyolo.base.errors import UserError
from dsyolo.config.batch_options import with_batch_options
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS
from dsyolo.config.deepspeed.config import check
from dsyolo.config.deepspeed.json_reader import JsonSource, read_json, read_source
from dsyolo.config.deepspeed.schema import TOP_LEVEL
from dsyolo.config.deepspeed.unknown_keys import FOREIGN_WORDS, _places
from dsyolo.config.run_config import RunConfig

MICRO = {"train_micro_batch_size_per_gpu": 2}


def problems_of(content: Any, accelerator: str = "cuda") -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        check({**MICRO, **content}, world_size=2, accelerator=accelerator)
    return caught.value.problems


@pytest.mark.parametrize("more", [{}, {"gradient_clipping": "auto"}])
@pytest.mark.parametrize("value", ["1" * 400, "[" * 100_000, "1e999", "nan"])
@pytest.mark.parametrize("key", ["train_batch_size", "steps_per_print"])
def test_no_string_is_a_traceback(tmp_path, key, value, more):
    path = tmp_path / "given.json"
    path.write_text(json.dumps({**MICRO, key: value, **more}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check(read_source(path), world_size=2, accelerator="cuda")
    assert caught.value.problems[0].startswith(f"{key}: ")


def test_a_number_that_no_float_holds_is_refused():
    assert problems_of({"gradient_clipping": 10**400})[0].startswith("gradient_clipping: 1000")


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"zero_optimization": 2}, 'Write {"stage": 2}.'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'Write {"device": "cpu"}.'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": True}}, 'Write {"device": "cpu"}.'),
        ({"optimizer": "Adam"}, 'Write {"type": "Adam"}.'),
        ({"scheduler": "WarmupLR"}, 'Write {"type": "WarmupLR"}.'),
        ({"pipeline": 2}, 'Write {"stages": 2}.'),
        ({"activation_checkpointing": True}, 'Write {"recompute": "blocks"}.'),
        ({"torch_autocast": "bf16"}, 'Write {"enabled": true, "dtype": "bf16"}.'),
        ({"bf16": 1}, 'Write {"enabled": true}.'),
        ({"bf16": True}, 'Write {"enabled": true}.'),
        ({"bf16": {"enabled": 1}}, "Write true."),
        ({"zero_optimization": {"stage": 1, "overlap_comm": 1}}, "Write true."),
        ({"gradient_clipping": False}, "Write 0."),
        ({"fp16": {"enabled": True, "loss_scale": "dynamic"}}, "Write 0."),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "Auto"}}, 'Write "auto".'),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": math.inf}}, "Write 1e9."),
        ({"optimizer": {"type": "Lamb"}}, 'The nearest is "AdamW".'),
        ({"optimizer": {"type": "OneBitAdam"}}, 'The nearest is "AdamW".'),
        ({"optimizer": {"type": "RMSprop"}}, 'The nearest is "SGD" with momentum.'),
        ({"optimizer": {"type": "Muon"}}, 'The nearest is "SGD" with momentum.'),
        ({"optimizer": {"type": "DeepSpeedCPUAdam"}}, 'Did you mean "Adam"?'),
        ({"communication_data_type": "bfloat16"}, 'Write "bf16".'),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0}}}, "Write such a value."),
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_a_value_of_the_wrong_type_is_answered_with_what_it_means(given, remedy):
    line = problems_of(given)[0]
    assert line.endswith(f" {remedy}")
    assert "eave it out" not in line


def test_long_names_of_types_are_taken():
    types = {"grad_accum_dtype": "torch.bfloat16", "param_dtype": "bfloat16"}
    ds = check(
        {**MICRO, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "data_types": types},
        world_size=2,
        accelerator="cuda",
    )
    assert (ds.precision.params, ds.precision.grads) == ("bf16", "bf16")


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({"optimizer": {"name": "AdamW"}}, "Write optimizer.type."),
        ({"scheduler": {"class": "WarmupLR"}}, "Write scheduler.type."),
        (
            {"scheduler": {"type": "WarmupLR", "warmup_num_steps": 100}},
            "Its place is scheduler.params.warmup_num_steps.",
        ),
        ({"warmup_num_steps": 100}, "Its place is scheduler.params.warmup_num_steps."),
        ({"learning_rate": 0.1}, "Its place is optimizer.params.lr."),
        ({"mixed_precision": "bf16"}, "Its place is torch_autocast.enabled."),
        ({"grad_clip": 1.0}, "Its place is gradient_clipping, at the top level."),
        ({"pipeline_stages": 2}, "Its place is pipeline.stages."),
    ],
    ids=json.dumps,
)
def test_a_word_of_another_library_has_its_place(given, end):
    assert any(line.endswith(end) for line in problems_of(given))


def test_no_option_is_offered_for_a_key_inside_a_block():
    for block in ({"optimizer": {"name": "AdamW"}}, {"optimizer": {"params": {"scale": 1}}}):
        assert "--" not in "".join(problems_of(block))


def test_every_place_of_a_foreign_word_exists():
    top = {"optimizer.type", "scheduler.type"}  # whose block's keys follow from its type
    for word, place in FOREIGN_WORDS.items():
        assert word not in TOP_LEVEL
        assert place in top or place in dict(_places(place.rpartition(".")[2])), word


def test_a_foreign_word_that_is_off_is_set_aside():
    ds = check({**MICRO, "use_amp": False, "half": 0}, world_size=2, accelerator="cuda")
    assert {path for path, _ in ds.set_aside} == {"use_amp", "half"}


@pytest.mark.parametrize("value", ["64", -3, 0, 1.5])
def test_a_wrong_batch_size_is_refused_under_the_option_too(value):
    run = RunConfig(data="data.yaml", batch=4)
    source, _ = with_batch_options(JsonSource("x.json", {BATCH_KEYS[0]: value}), run, 2)
    with pytest.raises(UserError, match=f"{BATCH_KEYS[0]}: "):
        check(source, world_size=2, accelerator="cuda")


def test_a_whole_number_with_a_point_is_a_batch_size():
    run = RunConfig(data="data.yaml", batch=4)
    content = {BATCH_KEYS[0]: 128.0, "pipeline": {"stages": 2.0}}
    source, _ = with_batch_options(JsonSource("x.json", content), run, 2)
    ds = check(source, world_size=2, accelerator="cuda")
    assert (ds.global_batch, ds.micro_batch, ds.dp_size) == (128, 4, 1)


def test_words_of_hjson_are_values(tmp_path):
    path = tmp_path / "given.json"
    text = """{
      # a comment
      "train_micro_batch_size_per_gpu": 2,
      "steps_per_print": Infinity,
      "gradient_clipping": inf, // none
      "dump_state": True,
      "zero_optimization": {"stage": 1, "overlap_comm": false}
    }"""
    path.write_text(text, encoding="utf-8")
    content = read_json(path).content
    assert content is not None
    assert "steps_per_print" not in content
    assert (content["gradient_clipping"], content["dump_state"]) == (0.0, True)


def test_a_block_of_offload_without_a_device_offloads_nothing():
    zero = {"stage": 2, "offload_optimizer": {"pin_memory": True}}
    ds = check({**MICRO, "zero_optimization": zero}, world_size=2, accelerator="cuda")
    assert [path for path, _ in ds.set_aside] == ["zero_optimization.offload_optimizer"]
    assert ds.parallelism.offload.devices == (None, None)


@pytest.mark.parametrize("value", [1, True])
def test_the_old_spelling_of_offload_may_be_a_number(value):
    zero = {"stage": 2, "cpu_offload": value}
    ds = check({**MICRO, "zero_optimization": zero}, world_size=2, accelerator="cuda")
    assert ds.parallelism.offload.devices[0] == "cpu"
    (line,) = problems_of({"zero_optimization": {**zero, "stage": 0}})
    assert line.startswith("zero_optimization.cpu_offload: ")


def test_keys_given_twice_are_found_in_a_long_block(tmp_path):
    path = tmp_path / "given.json"
    pairs = ", ".join(f'"_{number}": 1' for number in range(100_000))
    path.write_text(f'{{{pairs}, "_7": 2}}', encoding="utf-8")
    assert read_json(path).problems == ("_7: given twice. Leave one out.",)


def test_one_fault_of_precision_is_one_problem():
    fp16 = {"enabled": True}
    (line,) = problems_of({"fp16": fp16}, "cpu")
    assert line.endswith("in the place of fp16.")
    (line,) = problems_of({"fp16": fp16, "bf16": fp16})
    assert line.endswith("One of them can be on.")
    types = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}
    (line,) = problems_of({"bf16": fp16, **types, "pipeline": {"stages": 2}})
    assert line.endswith(" Leave it out.")


def test_tensor_parallelism_of_one_rank_is_off():
    for block in (
        {"autotp_size": 1, "dtype": "bf16"},
        {"tensor_parallel": {"tp_size": 1, "tp_grain_size": 64}},
    ):
        ds = check({**MICRO, "tensor_parallel": block}, world_size=2, accelerator="cuda")
        assert [path for path, _ in ds.set_aside] == ["tensor_parallel"]
    for block in ({"autotp_size": 2, "dtype": "bf16"}, {"autotp_size": True}):
        assert problems_of({"tensor_parallel": block})[0].startswith("tensor_parallel: ")
