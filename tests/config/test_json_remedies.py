"""Messages for values and keys of a DeepSpeed JSON that are nearly right: remedies lead to a JSON that is accepted."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import random
import re
from collections.abc import Iterator, Sequence
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


# ---- remedies that are followed


GOOD: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 10.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.05}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 9, "total_num_steps": 100, "warmup_type": "linear"},
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 500000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "pipeline": {"stages": 1},
    "activation_checkpointing": {"recompute": "none"},
}  # fmt: skip
ODD = [
    True, False, 0, 1, -1, 2, 3, 1.5, "auto", "cpu", "bf16", None, "2", "true", [], [1], {}, "none", "fp16", 7
]  # fmt: skip


def paths_in(block: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in block.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*above, key))


def block_of(content: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the block that has the last key of a path, made where there is none."""
    for key in path[:-1]:
        if not isinstance(content.get(key), dict):  # by a mistake that is another problem
            content[key] = {}
        content = content[key]
    return content


def with_mistakes(rng: random.Random) -> dict[str, Any]:
    """Return a JSON with one to three mistakes: an odd value, a key that is misspelled, misplaced or missing."""
    content = copy.deepcopy(GOOD)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(paths_in(content)))
        block, key, kind = block_of(content, path), path[-1], rng.randrange(5)
        if kind < 2:
            block[key] = rng.choice(ODD)
        elif kind == 2:
            at = rng.randrange(len(key))
            block[key[:at] + rng.choice("abcdexyz_") + key[at + rng.randrange(2) :]] = block.pop(key)
        elif kind == 3:
            value = block.pop(key)
            names = ("zero_optimization", "optimizer", "scheduler", "bf16")
            blocks = [content[name] for name in names if isinstance(content.get(name), dict)]
            rng.choice([content, *blocks])[key] = value
        else:
            del block[key]
    return content


def follow(content: dict[str, Any], problem: str) -> None:
    """Change a JSON as a person does who takes the remedy at the end of a problem literally."""
    place, _, rest = problem.partition(": ")
    path = tuple(place.split("."))
    block, key = block_of(content, path), path[-1]

    def move(to: str) -> None:
        value = block.pop(key)
        block_of(content, to.split("."))[to.rpartition(".")[2]] = value

    remedy = re.split(r"(?<=[^ ])\. (?=[A-Z])", rest)[-1]
    if found := re.match(r'(?:Write|Set it to) ("\w+"|[\[{].*[\]}]|-?[\d.e+-]+\d|true|false|\d)', remedy):
        block[key] = json.loads(found[1])
    elif found := re.match(r"Write ([\w.]+)\.$|Its place is ([\w.]+\w)", remedy):
        move(found[1] or found[2])
    elif found := re.match(r'(?:Did you mean|The nearest is) "(\w+)"', remedy):
        block[key] = found[1]
    elif found := re.match(r"Did you mean ([\w.]+)\?", remedy):
        move(".".join([*path[:-1], found[1]]) if "." not in found[1] else found[1])
    elif remedy.startswith("Write one of them") or re.search(r'must be "\w+" or', rest):
        block[key] = json.loads(re.search(r'must be ("\w+")', rest)[1])  # type: ignore[index]
    elif remedy.startswith(("Write such a value", "Set it lower")):
        block[key] = copy.deepcopy(functools.reduce(operator.getitem, path, GOOD))
    elif remedy.startswith("Write its keys in braces"):
        block[key] = {}
    elif remedy.startswith("Leave it out"):
        block.pop(key)
    elif remedy.startswith("Move its keys there"):
        content |= content.pop(key)
    elif remedy.startswith("Give one of them"):
        block[key] = 64
    elif remedy.startswith("One of them can be on"):
        block[key] = False
    elif found := re.match(r"(?:Leave|Remove) ([\w.]+\w)", remedy):
        block_of(content, found[1].split(".")).pop(found[1].rpartition(".")[2])
    elif found := re.match(r"Set ([\w.]+) to ([\w.\"]*\w)", remedy):
        block_of(content, found[1].split("."))[found[1].rpartition(".")[2]] = json.loads(found[2])
    else:
        raise AssertionError(f"no remedy that could be followed: {problem}")


@pytest.mark.parametrize("seeds", [range(400), pytest.param(range(400, 8000), marks=pytest.mark.soak)])
def test_remedies_that_are_followed_end_in_a_json_that_is_accepted(tmp_path, seeds):
    path = tmp_path / "ds.json"
    for seed in seeds:
        content, seen = with_mistakes(random.Random(seed)), []
        while True:
            path.write_text(json.dumps(content), encoding="utf-8")
            try:
                check(read_source(path), world_size=2, accelerator="cuda")
                break
            except UserError as error:
                problem = error.problems[0]
            assert problem not in seen, (seed, seen)
            assert len(seen) < 14, (seed, seen)
            seen.append(problem)
            follow(content, problem)
