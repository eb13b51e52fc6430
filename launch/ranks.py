#!/usr/bin/env python3
"""Starts this machine's ranks for a scheduler that stops them by SIGTERM, and ends with their exit status.

    python launch/ranks.py --ranks 8 --nodes 2 --node 0 --master_addr node0 dsyolo/train.py --data data.yaml --resume auto

Run it on every machine, each with its own --node. torchrun and deepspeed end with status 1 whatever the ranks' own was,
and `deepspeed` on one machine ends by SIGTERM at once, while its ranks save; so under them nobody learns that a run was
stopped and saved (75). Only python's own library is used: the first process of a container can be this.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

GRACE_S = 60  # for the others to end by themselves after one has failed: dsyolo's watchdog takes half of it


def starting(args: argparse.Namespace) -> Iterator[subprocess.Popen]:
    """One process per rank, told its place by the variables of torchrun."""
    common = {
        "WORLD_SIZE": args.ranks * args.nodes,
        "LOCAL_WORLD_SIZE": args.ranks,
        "MASTER_ADDR": args.master_addr,
        "MASTER_PORT": args.master_port,
    }
    for local in range(args.ranks):
        place = {**common, "RANK": args.node * args.ranks + local, "LOCAL_RANK": local}
        env = {**os.environ, **{key: str(value) for key, value in place.items()}}
        yield subprocess.Popen([sys.executable, "-u", *args.command], env=env)


def first_failure(processes: list[subprocess.Popen]) -> int:
    """Waits for all. The status of the first that failed, as a shell has it; those that do not end after it are killed."""
    status, end = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if not status and any(codes):
            status, end = next(filter(None, codes)), time.monotonic() + GRACE_S
        if None not in codes:
            return status if status >= 0 else 128 - status
        if time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, required=True, help="on each machine: its GPUs")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--node", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--master_addr", default="127.0.0.1", help="name or address of machine 0")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
    args = parser.parse_args()
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the ranks too
    for process in starting(args):
        processes.append(process)
    return first_failure(processes)


if __name__ == "__main__":
    sys.exit(main())
