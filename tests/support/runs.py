"""Whole training runs for tests, as a user starts them, in a folder with a small data set."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
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
    given = {key: value for key, value in settings.items() if value is not None}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def begin(place: Path, command: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
    """A process in `place`; what it says can be read while it runs, errors among it unless `settings` say otherwise."""
    said: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **settings}
    return subprocess.Popen(command, cwd=place, env=environment(place), text=True, **said)


def environment(place: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(place / "cache"), "DS_ACCELERATOR": "cpu"}


def alone(place: Path, name: str, *words: str, **options: object) -> subprocess.CompletedProcess:
    """A run in a process of its own, which is forked: see ranks.py."""
    return forked(place, [str(TRAIN), *arguments(place, name, **options), *words])


def together(
    place: Path, name: str, *words: str, num_ranks: int = 2, **options: object
) -> subprocess.CompletedProcess:
    """A run of several ranks as a launcher starts them, without the launcher's own 5 s: see `forked`."""
    return forked(place, [str(TRAIN), *arguments(place, name, **options), *words], num_ranks)


def forked(
    place: Path, command: list[str], num_ranks: int = 1, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run `python *command` in forked processes: as one, or as ranks of one world. The first rank that fails ends all.

    `extra`: more of the environment.
    """
    world = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        out, err, processes = Path(folder, "out"), Path(folder, "err"), []
        for rank in range(num_ranks):
            env = {**environment(place), **(extra or {})}
            if num_ranks > 1:
                env |= {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            processes.append(forking().Process(target=_script, args=(command, env, place, out, err)))
            processes[-1].start()
        end, fault = time.monotonic() + 300, False
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            wait([process.sentinel for process in processes if process.exitcode is None], 5)
            if not fault and any(process.exitcode for process in processes):
                fault, end = True, min(end, time.monotonic() + 30)
                _terminate(processes)
        codes = [process.exitcode for process in processes]
        if None in codes:
            for process in processes:
                process.kill()
                process.join()
            raise subprocess.TimeoutExpired(command, 300, out.read_bytes(), err.read_bytes())
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess(
            command, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )


def _terminate(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.exitcode is None:
            process.terminate()


def _script(command: list[str], environment: dict[str, str], place: Path, out: Path, err: Path) -> None:
    """Become `python *command`, in this process."""
    for path, standard in ((out, 1), (err, 2)):
        with path.open("ab") as file:  # of all ranks
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
