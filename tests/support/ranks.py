"""Real ranks for tests: gloo processes on this machine, each with one thread.

They are forked from a process that has imported torch and DeepSpeed once, since the imports take longer than most
tests. A rank on an accelerator is spawned: what is forked can't use one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest


def forking() -> BaseContext:
    """Context of processes that are forked with the modules of preloaded.py imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        ensure_running()  # keeps its environment: sys.path of the tests is not handed on by every Python
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 240, accelerator: str = "cpu"
) -> list[Any]:
    """Runs `work(*args)` in `world_size` processes that form one world; returns what each rank returned.

    `work` is a function of a module (it is sent by name), and what it returns can be pickled. Where one rank
    fails, all are ended and its traceback is raised.
    """
    context = forking() if accelerator == "cpu" else multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    ranks = [
        context.Process(
            target=_rank,
            args=(rank, world_size, port, accelerator, results, work, args, dict(os.environ)),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(world_size, results, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(world_size: int, results: Any, end: float) -> list[Any]:
    done: dict[int, Any] = {}
    while len(done) < world_size:
        try:
            rank, value, error = results.get(timeout=max(0.1, end - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"ranks {sorted(set(range(world_size)) - set(done))} gave no result") from None
        if error:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        done[rank] = pickle.loads(value)
    return [done[rank] for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    accelerator: str,
    results: Any,
    work: Callable[..., Any],
    args: tuple,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR=accelerator,
    )
    import torch

    torch.set_num_threads(1)
    try:
        # by value: a tensor in shared memory would go with its process
        results.put((rank, pickle.dumps(work(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def asked(request: Any, parameter: str) -> list[Any]:
    """Values of a parameter for which tests of the asking module run this time, so that a fixture makes no others."""
    items = [item for item in request.session.items if item.module is request.module]
    values = [item.callspec.params.get(parameter) for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(value for value in values if value is not None))


def long_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of a test: all `values`, and those that are not `quick` for `make soak` alone."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.soak) for value in values]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
