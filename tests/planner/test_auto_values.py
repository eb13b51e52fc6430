"""A DeepSpeed JSON with one "auto" and something odd beside it: an error in words, or a plan without leftovers."""

from __future__ import annotations

import pytest

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.config import check
from dsyolo.config.deepspeed.json_reader import JsonSource, settled, without_auto
from dsyolo.config.deepspeed.schema import TOP_LEVEL, JsonSection
from dsyolo.config.resolve import PlannedConfig
from dsyolo.config.run_config import RunConfig
from dsyolo.planner.auto import plan_config
from dsyolo.planner.hardware import DEVICES, GIB, Hardware

MICRO = {"train_micro_batch_size_per_gpu": 8}
GPU = Hardware(DEVICES["A100-80"], 2, 2, 80 * GIB, None, 3e9)
BLOCKS = [name for name, key in TOP_LEVEL.items() if isinstance(key, JsonSection)]


def planned(given: dict) -> PlannedConfig:
    read = settled(JsonSource("x.json", given))
    content, left_open = without_auto(read.content or {})
    source = JsonSource("x.json", content, tuple(left_open), read.problems, read.set_aside)
    return plan_config(RunConfig(data="data.yaml", model="yolov5n", imgsz=64), source, GPU, 80)


@pytest.mark.parametrize("value", [2, True, "x", [2]], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_no_block_is_refused_in_words_beside_an_auto(block, value):
    for auto in ({"fp16": {"enabled": "auto"}}, {"gradient_clipping": "auto"}):
        given = {**MICRO, **auto, block: value}
        if block == "zero_optimization" and value is True:  # an old spelling of stage 1
            assert planned(given).ds.zero_stage == 1
            continue
        with pytest.raises(UserError) as caught:
            planned(given)
        assert any(line.startswith(f"{block}: ") for line in caught.value.problems)


def test_what_is_set_aside_does_not_come_back():
    zero = {
        "stage": 1,
        "stage3_max_live_parameters": 5,
        "offload_param": {"device": "cpu", "pin_memory": "auto"},
    }
    ds = planned(
        {**MICRO, "gradient_clipping": "auto", "zero_optimization": zero, "activation_checkpointing": {}}
    ).ds
    assert ds.set_aside
    assert ds.source["zero_optimization"] == {"stage": 1}
    assert check(ds.source, world_size=2, accelerator="cuda").set_aside == ()


def test_a_type_that_autocast_cannot_have_goes_with_a_line():
    given = {
        **MICRO,
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": False},
        "communication_data_type": "fp16",
    }
    found = planned({**given, "zero_optimization": {"stage": 1}})
    assert found.ds.precision.is_autocast
    assert "communication_data_type" not in found.ds.source
    assert any(
        line.startswith("communication_data_type: left out, as under autocast") for line in found.lines
    )
    assert any(
        "bf16.enabled false, as the JSON has it, is about weights alone" in line for line in found.lines
    )


def test_a_type_that_is_auto_takes_the_recipes():
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    given = {**MICRO, "optimizer": {"type": "auto", "params": params}}
    scheduler = {"type": "auto", "params": {"warmup_num_steps": "auto"}}
    found = planned({**given, "scheduler": scheduler})
    assert found.ds.optimizer.type == "SGD"
    assert found.ds.scheduler is None
    assert "scheduler.type: auto, so left out, and the recipe's schedule holds" in found.lines
    assert check(found.ds.source, world_size=2, accelerator="cuda").optimizer.params["lr"] == 0.01
    with pytest.raises(UserError) as caught:
        planned({**given, "scheduler": {"type": "auto", "params": {"warmup_num_steps": 5}}})
    assert [line.split(" given")[0] for line in caught.value.problems] == ['scheduler.type: "auto"']
