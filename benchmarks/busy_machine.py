"""Images/s of a training on two cores, idle and beside a process that burns one of them, for several settings of threads.

    python benchmarks/busy_machine.py --rounds 3

Each row is a setting, run as a user runs it (`dsyolo/train.py`, its own process). All of them alternate in every round, idle
and busy in turn, so that what changes on the machine meanwhile meets all; the table has the median of the rounds and, in
brackets, the slowest and the fastest. A run's figure is the median of the images/s of the second half of its steps: the
first half is for the run to notice the load. "active" is GNU's OpenMP as it waits by default, in a loop of 300,000 turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsyolo.data.synthetic import draw_sample

TRAIN = Path(__file__).parents[1] / "dsyolo" / "train.py"
CONFIG = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.937, "nesterov": True}},
    "gradient_clipping": 10.0,
}
ACTIVE = {"GOMP_SPINCOUNT": "300000"}
SETTINGS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "2 threads, active (as it was)": (ACTIVE, ("--threads", "2")),
    "2 threads, passive": ({}, ("--threads", "2")),
    "1 thread": ({}, ("--threads", "1")),
    "default": ({}, ()),
}
WAITING = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_NUM_THREADS",
)  # the user's own would win


@contextmanager
def burning(processes: int, cores: Sequence[int]) -> Iterator[None]:
    """So many processes that do nothing but take the time of these cores."""
    code = f"import os\nos.sched_setaffinity(0, {list(cores)})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def images_per_s(place: Path, setting: str, cores: Sequence[int], options: argparse.Namespace) -> float:
    """Train once with a setting."""
    variables, words = SETTINGS[setting]
    env = {name: value for name, value in os.environ.items() if name not in WAITING}
    folder = Path(tempfile.mkdtemp(dir=place))
    command = [sys.executable, str(TRAIN), "--data", str(place / "sample/data.yaml")]
    command += ["--deepspeed_config", str(place / "ds.json"), "--model", options.model]
    command += ["--imgsz", str(options.imgsz), "--epochs", str(options.epochs), "--val_every", "1000"]
    command += [
        "--save_every",
        "1000",
        "--log_every",
        "1",
        "--memory_profile",
        "off",
        "--project",
        str(folder),
        *words,
    ]
    subprocess.run(
        command,
        env={**env, **variables, "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": str(place / "cache")},
        check=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    lines = (folder / "train/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [row["images_per_s"] for row in map(json.loads, lines) if row["kind"] == "step"]
    return statistics.median(rates[len(rates) // 2 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="times that each setting runs idle, and busy (default: 3)")
    add("--burn", type=int, default=1, help="processes that burn a core each (default: 1)")
    add("--model", default="yolov5n")
    add("--imgsz", type=int, default=320)
    add("--epochs", type=int, default=8, help="of 6 steps each (default: 8)")
    options = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[:2]
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        draw_sample(place / "sample", num_images=120, image_size=(320, 320))
        (place / "ds.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for number in range(options.rounds):
            for burn in (0, options.burn):
                for setting in SETTINGS:
                    with burning(burn, cores):
                        rate = images_per_s(place, setting, cores, options)
                    found.setdefault((setting, burn), []).append(rate)
                    print(f"round {number + 1}, {burn} burning, {setting}: {rate:.1f} images/s", flush=True)
    print(f"\n{'images/s on 2 cores':<32} {'idle':<24} {options.burn} burning")
    for setting in SETTINGS:
        cells = [_cell(found[setting, burn]) for burn in (0, options.burn)]
        print(f"{setting:<32} {cells[0]:<24} {cells[1]}")
    return 0


def _cell(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


if __name__ == "__main__":
    sys.exit(main())
