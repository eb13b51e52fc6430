"""Whole training runs for tests, as a user starts them, in a folder with a small data set."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ranks import forking, free_port

from dsyolo.data.synthetic import draw_sample

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "dsyolo" / "train.py"
CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.937, "nesterov": True}},
    "gradient_clipping": 10.0,
}


def make_place(folder: Path) -> Path:
    """A folder with a data set of 24 + 6 images and a DeepSpeed JSON."""
    draw_sample(folder / "sample", num_images=30, image_size=(96, 96))
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    return folder


def arguments(place: Path, name: str, **options: object) -> list[str]:
    settings = {
        "data": place / "sample/data.yaml",
        "deepspeed_config": place / "ds.json",
        "imgsz": 64,
        "epochs": 3,
        "log_every": 1,
        "threads": 1,
        "project": place / "runs",
        "name": name,
        **options,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def begin(place: Path, command: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
    """A process in `place`; what it says can be read while it runs, errors among it unless `settings` say otherwise."""
    said: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **settings}
    return subprocess.Popen(command, cwd=place, env=environment(place), text=True, **said)


def environment(place: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(place / "cache"), "DS_ACCELERATOR": "cpu"}


def alone(place: Path, name: str, *words: str, **options: object) -> subprocess.CompletedProcess:
    """A run in a process of its own, which is forked: see ranks.py."""
    command = [str(TRAIN), *arguments(place, name, **options), *words]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = forking().Process(target=_script, args=(command, environment(place), place, out, err))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, 300, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(
            command, process.exitcode, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )


def _script(command: list[str], environment: dict[str, str], place: Path, out: Path, err: Path) -> None:
    """Become `python *command`, in this process."""
    for path, standard in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), standard)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[:] = command
    sys.path[:] = [
        str(Path(command[0]).parent),
        *(path for path in sys.path if path != str(Path(__file__).parent)),
    ]
    runpy.run_path(command[0], run_name="__main__")


def launcher(num_ranks: int = 2) -> list[str]:
    """The command that launches ranks, which meet at a port that is free now."""
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--num_gpus", str(num_ranks), "--master_port", str(free_port())]


def launch(place: Path, name: str, *words: str, **options: object) -> list[str]:
    return [*launcher(), str(TRAIN), *arguments(place, name, **options), *words]


def rows(place: Path, name: str, kind: str) -> list[dict]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(place: Path, name: str) -> list[tuple[float, ...]]:
    return [(row["step"], row["box"], row["obj"], row["cls"]) for row in rows(place, name, "step")]
