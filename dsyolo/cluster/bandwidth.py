"""One rank of the network probe: rendezvous, reachability, latency and bandwidth, by gloo as in a run.

`dsyolo doctor` starts `python -m dsyolo.cluster.bandwidth REQUEST` on all hosts and reads the JSON line that it prints.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from dsyolo.cluster.shared_fs import appears

LIFE_S = 50  # then it ends itself, since nobody may be left to do it
WAIT_S = 20  # the other ranks may import torch from a slow disk
CONNECT_S = 3
PINGS = 30
LEAST_BYTES, MOST_BYTES = 1 << 18, 1 << 25  # doubled until a message takes MESSAGE_S
MESSAGE_S = 0.1
LAST = -1  # a size that means: no more messages


def main(request: dict[str, Any]) -> None:
    """Print the result. A step that fails is named in it, and is the last."""
    signal.alarm(LIFE_S)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"section": "result", "fault": ""}
    try:
        steps: list[Callable[..., bool | None]] = [_meet, _find_token, _reach, _measure]
        for step in steps:
            found["fault"] = step.__name__.strip("_")
            if step(request, found) is False:
                break
        else:
            found["fault"] = ""
    except (RuntimeError, OSError) as error:  # torch's are RuntimeErrors
        found["text"] = str(error).splitlines()[0][:500]
    out.write(json.dumps({key: value for key, value in found.items() if key != "store"}) + "\n")
    out.flush()
    os._exit(0)  # without waiting for lost ranks


def _meet(request: dict[str, Any], found: dict[str, Any]) -> None:
    """Meet at the address and port of rank 0, as every run does."""
    host, port = request["master"]
    first, wait = request["rank"] == 0, timedelta(seconds=WAIT_S)
    found["store"] = torch_dist.TCPStore(host, port, None, first, wait, wait_for_workers=False)
    _barrier(request, found["store"], "met")


def _barrier(request: dict[str, Any], store: torch_dist.Store, name: str) -> None:
    if store.add(name, 1) == request["size"]:
        store.set(f"{name} by all", "")
    store.wait([f"{name} by all"], timedelta(seconds=WAIT_S))


def _find_token(request: dict[str, Any], found: dict[str, Any]) -> None:
    """Check whether the folder of runs is shared: a file that rank 0 creates appears on the others."""
    folder = Path(os.path.abspath(request["project"]))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    token = folder / request["token"]
    with contextlib.ExitStack() as stack:
        if request["rank"] == 0:
            token.touch()
            stack.callback(token.unlink)
        _barrier(request, found["store"], "token made")
        found["sees_token"] = appears(token)
        _barrier(request, found["store"], "token seen")


def _reach(request: dict[str, Any], found: dict[str, Any]) -> bool:
    """Return whether each rank can connect to each other, which gloo needs."""
    store, rank = found["store"], request["rank"]
    others = [other for other in range(request["size"]) if other != rank]
    family = socket.AF_INET6 if ":" in request["own"] else socket.AF_INET
    with socket.create_server((request["own"], 0), family=family, backlog=1024) as server:
        store.set(f"place {rank}", json.dumps([request["own"], server.getsockname()[1]]))
        places = {other: json.loads(store.get(f"place {other}")) for other in others}
        with ThreadPoolExecutor(32) as pool:
            reached = list(pool.map(_connects, places.values()))
        found["unreached"] = [other for other, does in zip(others, reached, strict=True) if not does]
        store.add("faults", len(found["unreached"]))
        _barrier(request, store, "connected")
    return store.add("faults", 0) == 0


def _connects(place: list[Any]) -> bool:
    try:
        socket.create_connection((place[0], place[1]), CONNECT_S).close()
    except OSError:
        return False
    return True


def _measure(request: dict[str, Any], found: dict[str, Any]) -> None:
    """Measure latency and bandwidth from each rank to the next one of the ring, with no rank in two pairs at once."""
    size, rank = request["size"], request["rank"]
    store = torch_dist.PrefixStore("gloo", found["store"])
    wait = timedelta(seconds=WAIT_S)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    found["links"] = []
    pairs = [(0, 1)] if size == 2 else [(i, (i + 1) % size) for i in range(size)]
    for turn in range(3):  # the last pair of an odd ring shares a rank with the first
        for number, (source, target) in enumerate(pairs):
            is_last = size % 2 == 1 and number == size - 1
            if turn == (2 if is_last else number % 2):
                if rank == source:
                    found["links"].append({"to": target, **_send(target)})
                elif rank == target:
                    _answer(source)
        torch_dist.barrier()


def _send(target: int) -> dict[str, float]:
    """Return the seconds one way of an 8-byte message, and the bytes per second of large ones."""
    latency_s = statistics.median(_message(target, 0) for _ in range(PINGS)) / 2
    num_bytes = LEAST_BYTES
    while (taken_s := _message(target, num_bytes)) < MESSAGE_S and num_bytes < MOST_BYTES:
        num_bytes *= 2
    torch_dist.send(torch.tensor([LAST]), target)
    return {"latency_s": latency_s, "bytes_per_s": num_bytes / max(taken_s - 2 * latency_s, 1e-9)}


def _message(target: int, num_bytes: int) -> float:
    """Return the seconds to send a size and that many bytes, and to get a receipt."""
    content = torch.zeros(num_bytes, dtype=torch.uint8)
    begin = time.perf_counter()
    torch_dist.send(torch.tensor([num_bytes]), target)
    if num_bytes:
        torch_dist.send(content, target)
    torch_dist.recv(torch.zeros(1), target)
    return time.perf_counter() - begin


def _answer(source: int) -> None:
    size = torch.zeros(1, dtype=torch.int64)
    while torch_dist.recv(size, source) == source and int(size) != LAST:
        if int(size):
            torch_dist.recv(torch.empty(int(size), dtype=torch.uint8), source)
        torch_dist.send(torch.zeros(1), source)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
