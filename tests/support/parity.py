"""Every strategy against the plain loop in torch: the table behind "how a training is spread out changes its cost".

    make parity        # 20 steps of all rows, some minutes; ends with status 1 where a row breaks its bound

Each row trains yolov5n on noise of 64 px with real ranks (gloo), and is compared with `training.plain`: one process,
one thread, fp32, nothing of DeepSpeed. Where BatchNorm's statistics are live or synchronised, rates are a hundredth of
the recipe's: at the recipe's own, rounding grows tenfold every other step, in plain torch with one thread against two
as well (6e-2 on losses after 20 steps), so nothing could be told from it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import training
from ranks import run_ranks

STEPS = 20
LIVE_RATES = 0.01
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
BF16 = {"bf16": {"enabled": True}}
BLOCKS = {"activation_checkpointing": {"recompute": "blocks"}}
# bfloat16 has 8 significant bits: every activation and weight is rounded by up to 2^-9 of itself. Losses may differ by
# twice that; weights by somewhat more, as a bias starts at 0 and so has no size yet to compare with.
BF16_LOSSES, BF16_WEIGHTS = 2**-8, 1e-2


class Row(NamedTuple):
    """One strategy: (ranks, ZeRO stage, JSON) and how BatchNorm is treated."""

    name: str
    ranks: int
    stage: int
    json: dict[str, Any]
    batchnorm: str = "frozen"  # frozen, live or synchronised
    at_once: int = 1  # groups of two images in a micro-batch of a rank

    @property
    def is_bf16(self) -> bool:
        return "torch_autocast" in self.json or "bf16" in self.json


def offload(stage: int, **devices: str) -> dict[str, Any]:
    """A ZeRO block with offload; the device `folder` is a folder on disk."""
    blocks = {
        f"offload_{what}": {"device": "nvme", "nvme_path": tempfile.gettempdir()}
        if device == "folder"
        else {"device": device}
        for what, device in devices.items()
    }
    return {"zero_optimization": {"stage": stage, **blocks}}


def pipeline(stages: int, **more: Any) -> dict[str, Any]:
    return {"pipeline": {"stages": stages}, **more}


ROWS = (
    Row("1 rank, accumulation 4", 1, 0, {}, "live"),
    Row("1 rank, accumulation 2", 1, 0, {}, at_once=2),
    Row("1 rank, accumulation 1", 1, 0, {}, at_once=4),
    *(Row(f"2 ranks, ZeRO {stage}", 2, stage, {}) for stage in range(4)),
    *(Row(f"2 ranks, ZeRO {stage}, live BatchNorm", 2, stage, {}, "live") for stage in range(4)),
    Row("4 ranks, ZeRO 1, live BatchNorm", 4, 1, {}, "live"),
    *(
        Row(f"2 ranks, ZeRO {stage}, synchronised BatchNorm", 2, stage, {}, "synchronised")
        for stage in range(4)
    ),
    Row("2 ranks, ZeRO 1, optimizer on the host", 2, 1, offload(1, optimizer="cpu")),
    Row(
        "2 ranks, ZeRO 3, optimizer and parameters on the host",
        2,
        3,
        offload(3, optimizer="cpu", param="cpu"),
    ),
    Row("2 ranks, ZeRO 2, optimizer in a folder", 2, 2, offload(2, optimizer="folder")),
    Row(
        "2 ranks, ZeRO 3, optimizer and parameters in a folder",
        2,
        3,
        offload(3, optimizer="folder", param="folder"),
    ),
    *(
        Row(f"2 ranks, ZeRO 2, {what}", 2, 2, {"zero_optimization": {"stage": 2, **key}})
        for what, key in (
            ("gradients in a list", {"contiguous_gradients": False}),
            ("buckets summed for all", {"reduce_scatter": False}),
            ("two buckets in turn", {"overlap_comm": True, "reduce_bucket_size": 100_000}),
        )
    ),
    Row("1 rank, recompute by block", 1, 0, BLOCKS, "live"),
    Row("2 ranks, ZeRO 2, recompute by block, synchronised BatchNorm", 2, 2, BLOCKS, "synchronised"),
    Row("pipeline of 2 stages, ZeRO 0", 2, 0, pipeline(2), "live"),
    Row("pipeline of 2 stages, ZeRO 1", 2, 1, pipeline(2), "live"),
    Row("pipeline of 2 stages, ZeRO 1, recompute by block", 2, 1, pipeline(2, **BLOCKS), "live"),
    Row("pipeline of 4 stages, ZeRO 0", 4, 0, pipeline(4), "live"),
    Row("pipeline of 19 stages, as many as layers with parameters", 19, 0, pipeline(19), "live"),
    Row("pipeline of 2 stages x 2 replicas, ZeRO 1", 4, 1, pipeline(2)),
    Row(
        "pipeline of 2 stages x 2 replicas, ZeRO 1, synchronised BatchNorm", 4, 1, pipeline(2), "synchronised"
    ),
    Row("2 ranks, ZeRO 2, bf16 autocast", 2, 2, AUTOCAST),
    Row("2 ranks, ZeRO 1, bf16 weights", 2, 1, BF16),
    Row("pipeline of 2 stages, ZeRO 1, bf16 autocast", 2, 1, pipeline(2, **AUTOCAST)),
    Row("pipeline of 2 stages, ZeRO 1, bf16 weights", 2, 1, pipeline(2, **BF16)),
)


def train_rows(names: list[str], steps: int, folder: str) -> dict[str, dict[str, Any]]:
    """Return what a rank got from each row, all of one number of ranks."""
    found = {}
    # Autocast last: DeepSpeed keeps in a global that it was on.
    for row in sorted((row for row in ROWS if row.name in names), key=lambda row: row.is_bf16):
        training.RATES = 1.0 if row.batchnorm == "frozen" else LIVE_RATES
        engine, partitions, ema, _ = training.build(
            row.stage,
            Path(folder),
            frozen=row.batchnorm == "frozen",
            synchronised=row.batchnorm == "synchronised",
            at_once=row.at_once,
            **row.json,
        )
        losses = training.train(engine, ema, 0, steps, row.at_once)
        found[row.name] = training.result(engine, partitions, ema, losses)
    return found


def compare(rows: tuple[Row, ...], steps: int) -> dict[str, dict[str, float]]:
    """The largest relative differences of every row from the plain loop."""
    got: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({row.ranks for row in rows}):
            names = [row.name for row in rows if row.ranks == ranks]
            got |= run_ranks(ranks, train_rows, names, steps, folder, timeout_s=1800)[0]
    expected: dict[tuple[str, int], dict[str, Any]] = {}
    found = {}
    for row in rows:
        together = row.ranks // row.json.get("pipeline", {}).get("stages", 1)
        key = (row.batchnorm, together if row.batchnorm == "synchronised" else 1)
        if key not in expected:
            training.RATES = 1.0 if row.batchnorm == "frozen" else LIVE_RATES
            expected[key] = training.plain(steps, frozen=key[0] == "frozen", at_once=key[1])
            training.RATES = 1.0
        found[row.name] = training.differences(got[row.name], expected[key])
    return found


def breaks(row: Row, found: dict[str, float]) -> bool:
    """Whether a row differs by more than it may."""
    if row.is_bf16:
        return found["losses"] > BF16_LOSSES or max(found.values()) > BF16_WEIGHTS
    return found["losses"] > 1e-5 or max(found.values()) > 1e-4


def main() -> int:
    found = compare(ROWS, STEPS)
    print(
        f"\n| strategy | BatchNorm | losses of {STEPS} steps | weights | EMA | buffers |\n|---|---|---|---|---|---|"
    )
    for row in ROWS:
        figures = " | ".join(
            f"{found[row.name][kind]:.1e}" for kind in ("losses", "weights", "ema", "buffers")
        )
        print(
            f"| {row.name} | {row.batchnorm} | {figures} |{' BROKEN' if breaks(row, found[row.name]) else ''}"
        )
    return int(any(breaks(row, found[row.name]) for row in ROWS))


if __name__ == "__main__":
    sys.exit(main())
