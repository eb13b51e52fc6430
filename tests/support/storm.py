"""A storm of faults over runs on one machine and on two hosts: what each does to them, and that nothing is lost.

    make storm                       # as root for the hosts and the small disk; otherwise those faults are left out
    python tests/support/storm.py --seed 1 --faults 12 --only machine

A run trains through the launcher while faults, drawn by a seed, come at drawn moments. After each fault the same command,
with `--resume auto`, goes on. At the end its weights must be bit-equal to those of a run that nobody disturbed, and so must
the losses of all its steps; and at no moment may a checkpoint that was there be gone for anything but newer ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from hosts import Cluster, all_pids, parent_of, variable_of, why_not
from runs import CONFIG, TRAIN, arguments, environment, launch, losses, make_place, rows
from safetensors.torch import load_file

from dsyolo.checkpoint.manifest import all_checkpoints, read_manifest
from dsyolo.cluster import preemption as stop
from dsyolo.cluster import watchdog
from dsyolo.trainer.hooks.checkpoint_hook import NOT_SAVED

EPOCHS, STEPS_OF_EPOCH = 80, 3
OPTIONS = {
    "epochs": EPOCHS,
    "imgsz": 96,
    "workers": 1,
    "val_every": 2,
    "patience": 0,
    "rendezvous_timeout_s": 40,
}
DISK_BYTES = 140 << 20  # three checkpoints of 21 MiB, one that is being written, weights
NOTICE_S = 60  # until all ranks have ended, at most


class Outcome(NamedTuple):
    """The outcome of one fault."""

    fault: str
    where: str
    moment: str
    noticed_s: float
    status: int | None
    said: str
    step: int  # of the newest checkpoint then


class Site:
    """Where a run's ranks are: how it is started, and which processes they are.

    Args:
        disk: a folder that holds little, for a full disk; None where there is none.
    """

    def __init__(self, place: Path, name: str, disk: Path | None, cluster: Cluster | None = None) -> None:
        self.place, self.name, self.cluster, self.disk = place, name, cluster, disk
        self.title = "two hosts" if cluster else "one machine"
        self.folder = place / "runs" / name
        self.log = place / f"{name}.log"
        self.port = 29850
        self.process: subprocess.Popen | None = None
        self._log_starts = 0

    def start(self) -> None:
        self.port += 1  # the last one may be held by what was killed, for a while
        options = {**OPTIONS, "project": self.place / "runs"}
        words = [*arguments(self.place, self.name, **options), "--resume", "auto"]
        self._log_starts = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as out:
            streams = {"stdout": out, "stderr": subprocess.STDOUT, "cwd": self.place}
            if self.cluster:
                command = [*self.cluster.deepspeed(), "--master_port", str(self.port), str(TRAIN), *words]
                self.process = self.cluster.popen(command, **streams)
            else:
                command = launch(self.place, self.name, "--resume", "auto", **options)
                self.process = subprocess.Popen(
                    command, env=environment(self.place), start_new_session=True, **streams
                )

    def ranks(self) -> dict[int, int]:
        """This machine's process ids by rank."""
        if self.cluster:
            return self.cluster.ranks()
        found = {}
        for pid in all_pids():
            rank = variable_of(pid, "RANK") if self._is_ours(pid) else None
            if rank is not None and variable_of(parent_of(pid), "RANK") is None:
                found[int(rank)] = pid
        return dict(sorted(found.items()))

    def _is_ours(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return str(TRAIN).encode() in words and self.name.encode() in words

    def said(self) -> str:
        """Since the last start."""
        with self.log.open() as file:
            file.seek(self._log_starts)
            return file.read()

    def step(self) -> int:
        """The last one in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return max((row[0] for row in losses(self.place, self.name)), default=0) if path.exists() else 0

    def saved(self) -> list[int]:
        """Steps of the whole checkpoints."""
        return [int(path.name[5:13]) for path in all_checkpoints(self.folder / "checkpoints")]

    def has_ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None and not self.ranks()

    def wait(self, until: Callable[[], bool], timeout_s: float, what: str, pause_s: float = 0.02) -> None:
        end = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > end:
                raise AssertionError(f"{self.name}: no {what} within {timeout_s:.0f} s\n{self.said()}")
            time.sleep(pause_s)

    def end_now(self) -> None:
        """Whatever is left of it."""
        for pid in self.ranks().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


# ---- moments: each waits until the run is there


def loading(site: Site, rng: random.Random) -> None:
    """Ranks are there; whatever they do until their first step."""
    site.wait(lambda: len(site.ranks()) == 2, 60, "ranks")
    time.sleep(rng.uniform(0, 8))


def stepping(site: Site, rng: random.Random) -> None:
    begin = site.step()
    wanted = begin + rng.randint(1, 2 * STEPS_OF_EPOCH)
    site.wait(lambda: site.step() >= wanted, 120, f"step {wanted}")
    time.sleep(rng.uniform(0, 0.2))


def validating(site: Site, rng: random.Random) -> None:
    begin = site.step()
    last = (begin // (2 * STEPS_OF_EPOCH) + 1) * 2 * STEPS_OF_EPOCH  # every second epoch is validated
    site.wait(lambda: site.step() >= last, 120, f"step {last}", pause_s=0.002)
    time.sleep(rng.uniform(0, 0.05))


def saving(site: Site, rng: random.Random) -> None:
    """A checkpoint is being written, or its weights are."""
    begin = site.step()
    site.wait(lambda: site.step() > begin, 120, "step")
    folder = site.folder / "checkpoints"
    site.wait(lambda: any(folder.glob(".step_*.part")), 60, "saving", pause_s=0.0005)
    time.sleep(rng.uniform(0, 0.1))


MOMENTS = {"loading": loading, "step": stepping, "validation": validating, "saving": saving}


# ---- faults while it runs: each does its harm and gives what must be undone


def send(number: signal.Signals) -> Callable[[Site, random.Random], Callable[[], None]]:
    def fault(site: Site, rng: random.Random) -> Callable[[], None]:
        ranks = site.ranks()
        pid = ranks[rng.choice(sorted(ranks))] if ranks else None

        def tell(number: signal.Signals) -> None:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        tell(number)
        # alone on its host nobody can end a stopped process: it ends itself once it may go on
        return lambda: tell(signal.SIGCONT) if number == signal.SIGSTOP else None

    return fault


def end_the_launcher(site: Site, rng: random.Random) -> Callable[[], None]:
    """End the process that a user starts as `deepspeed`; on one machine it tells its ranks nothing."""
    site.process.terminate()
    return lambda: None


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"
    except OSError:
        return False


def pull_the_cable(site: Site, rng: random.Random) -> Callable[[], None]:
    assert site.cluster is not None
    host = rng.randint(0, 1)
    site.cluster.link(host, up=False)
    return lambda: site.cluster.link(host, up=True)


def fill_the_disk(site: Site, rng: random.Random) -> Callable[[], None]:
    """All but a little: the run must say so, keep what it has, and go on once there is room."""
    assert site.disk is not None
    ballast = site.disk / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    return ballast.unlink


# ---- faults between two starts


def cut_the_newest_checkpoint(site: Site, rng: random.Random) -> Callable[[], None]:
    newest = all_checkpoints(site.folder / "checkpoints")[-1]
    victim = rng.choice(sorted(newest.iterdir()))
    os.truncate(victim, rng.randrange(victim.stat().st_size))
    return lambda: None


def spoil_the_cache(site: Site, rng: random.Random) -> Callable[[], None]:
    for cache in (site.place / "cache").rglob("index-*.npz"):
        content = bytearray(cache.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        cache.write_bytes(content)
    return lambda: None


def leave_a_lock(site: Site, rng: random.Random) -> Callable[[], None]:
    """As a killed build of one of DeepSpeed's ops does."""
    for op in ("deepspeed_shm_comm", "cpu_adam", "fused_adam"):
        folder = site.place / "cache/torch_extensions/py311_cpu" / op
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    return lambda: None


def break_an_image(site: Site, rng: random.Random) -> Callable[[], None]:
    """It is not the data that the run began with: it must refuse, and go on when the image is back."""
    victim = rng.choice(sorted((site.place / "sample/images/train").iterdir()))
    content, status = victim.read_bytes(), victim.stat()
    victim.write_bytes(content[: len(content) // 2])

    def undo() -> None:
        victim.write_bytes(content)
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))

    return undo


class Fault(NamedTuple):
    harm: Callable[[Site, random.Random], Callable[[], None]]
    moments: tuple[str, ...]  # empty: between two starts
    statuses: tuple[int, ...]  # the launcher's on one machine, but while loading; empty: any but 0
    says: str
    where: str = "both"


ANY = ("loading", "step", "validation", "saving")
RUNNING = {
    "SIGKILL of a rank": Fault(send(signal.SIGKILL), ANY, (), "is lost"),
    "SIGTERM to a rank": Fault(send(signal.SIGTERM), ANY, (stop.STATUS,), "Preempted"),
    # The stopped one is killed in the end: the launcher tells the status of the rank that it sees first.
    "SIGSTOP of a rank": Fault(send(signal.SIGSTOP), ANY, (watchdog.STATUS, 256 - signal.SIGKILL), "is lost"),
    "SIGTERM to deepspeed": Fault(end_the_launcher, ANY[1:], (-signal.SIGTERM,), "Preempted"),
    "ip link set down": Fault(pull_the_cable, ANY[1:], (), "is lost", "hosts"),
    "full disk": Fault(fill_the_disk, ("step",), (stop.STATUS, NOT_SAVED), "could not be written", "machine"),
}
RESTING = {
    "truncated checkpoint": Fault(cut_the_newest_checkpoint, (), (0,), "the one before it is used"),
    "corrupt cache": Fault(spoil_the_cache, (), (0,), "all files are read again"),
    "stale build lock": Fault(leave_a_lock, (), (0,), ""),
    "unreadable image": Fault(break_an_image, (), (2,), "num_images"),
}


def disturb(site: Site, name: str, moment: str, rng: random.Random) -> Outcome:
    """Starts the run, does the harm while it runs, waits for its end or its word, and undoes it."""
    fault = RUNNING[name]
    site.start()
    MOMENTS[moment](site, rng)
    before = site.saved()
    begin = time.monotonic()
    undo = fault.harm(site, rng)
    if name == "full disk":
        site.wait(lambda: "could not be written" in site.said() or site.has_ended(), 120, "word of it")
        noticed_s = time.monotonic() - begin
        undo()
        saved = len(site.saved()) and site.saved()[-1]
        site.wait(lambda: site.has_ended() or site.saved()[-1] > saved, 120, "checkpoint when there is room")
        for pid in list(site.ranks().values())[:1]:
            os.kill(pid, signal.SIGTERM)
        site.wait(site.has_ended, 90, "end")
    else:
        site.wait(lambda: all(map(is_stopped, site.ranks().values())), NOTICE_S + 30, "end of all ranks")
        noticed_s = time.monotonic() - begin
        undo()
        site.wait(
            site.has_ended, 60, "end of all and of the launcher"
        )  # it may wait for an ssh behind a cable that was out
    said = site.said()
    assert noticed_s <= NOTICE_S or name == "full disk", (name, moment, noticed_s, said)
    assert "Traceback" not in said or name.startswith(("SIGKILL", "ip link", "SIGSTOP")), said
    assert not before or site.saved()[-1] >= before[-1], (name, before, site.saved())
    status = site.process.returncode
    if moment != "loading" and not site.cluster:
        assert status in fault.statuses if fault.statuses else status != 0, (name, moment, status, said)
    return Outcome(
        name,
        site.title,
        moment,
        noticed_s,
        site.process.returncode,
        last_word(said, fault.says),
        site.saved()[-1] if site.saved() else 0,
    )


def spoil(site: Site, name: str, rng: random.Random) -> Outcome:
    """Does the harm while nothing runs, and starts the run: it must say so, and go on or refuse."""
    fault = RESTING[name]
    undo = fault.harm(site, rng)
    before = site.saved()
    site.start()
    begin = time.monotonic()
    step = site.step()
    if fault.statuses == (0,):
        site.wait(lambda: site.step() > step or site.has_ended(), 120, "further step")
        noticed_s = time.monotonic() - begin
        assert not site.has_ended() or site.process.returncode == 0, site.said()
        for pid in list(site.ranks().values())[:1]:
            os.kill(pid, signal.SIGTERM)
    site.wait(site.has_ended, 90, "end")
    if fault.statuses != (0,):
        noticed_s = time.monotonic() - begin
    undo()
    said = site.said()
    assert fault.says in said, (name, said)
    assert "Traceback" not in said, said
    assert name == "truncated checkpoint" or site.saved()[-1] >= before[-1], (name, before, site.saved())
    return Outcome(
        name,
        site.title,
        "between two starts",
        noticed_s,
        site.process.returncode,
        last_word(said, fault.says),
        site.saved()[-1],
    )


def last_word(said: str, wanted: str) -> str:
    """The line of what was said that tells of the fault; of a rank that is lost before all have met, in other words."""
    words = (
        ["is lost", "did not join", "found no rank 0"] if wanted == "is lost" else [wanted] if wanted else []
    )
    lines = [line.strip() for line in said.splitlines() if any(word in line for word in words)]
    return lines[-1][:120] if lines else ""


def storm(site: Site, num_faults: int, rng: random.Random) -> Iterator[Outcome]:
    """All kinds of faults that this site can have, in a drawn order, until there are so many."""
    here = "hosts" if site.cluster else "machine"
    kinds = [
        (name, moment)
        for name, fault in {**RUNNING, **RESTING}.items()
        if fault.where in ("both", here) and (name != "full disk" or site.disk)
        for moment in fault.moments or ("",)
    ]
    drawn: list[tuple[str, str]] = []
    while len(drawn) < num_faults:
        drawn += rng.sample(kinds, len(kinds))
    for name, moment in drawn[:num_faults]:
        if not moment and len(site.saved()) < 2:
            name, moment = "SIGTERM to a rank", "saving"  # first something to spoil
        if site.step() > (EPOCHS - 8) * STEPS_OF_EPOCH:
            break  # the run is nearly over
        try:
            yield disturb(site, name, moment, rng) if moment else spoil(site, name, rng)
        finally:
            site.end_now()
            for damaged in (site.folder / "checkpoints").glob(
                "damaged_*"
            ):  # as its user would: the disk is small
                shutil.rmtree(damaged)


def finish(site: Site) -> None:
    site.start()
    site.wait(site.has_ended, 600, "end", pause_s=0.5)
    assert site.process.returncode == 0, site.said()


def compare(site: Site, undisturbed: Site) -> str:
    """In words; raises where anything differs."""
    for name in ("last", "best"):
        first, second = (load_file(one.folder / f"weights/{name}.safetensors") for one in (site, undisturbed))
        assert first.keys() == second.keys()
        differ = [key for key, tensor in first.items() if not torch.equal(tensor, second[key])]
        assert not differ, f"{name}.safetensors: {differ[:3]}"
    first, second = (losses(one.place, one.name) for one in (site, undisturbed))
    assert first == second, next(pair for pair in zip(first, second, strict=False) if pair[0] != pair[1])
    figures = [
        [row.get("map50_95") for row in rows(one.place, one.name, "epoch")] for one in (site, undisturbed)
    ]
    assert figures[0] == figures[1]
    newest = all_checkpoints(site.folder / "checkpoints")[-1]
    assert read_manifest(newest).progress.step == EPOCHS * STEPS_OF_EPOCH
    return f"{site.title}: weights, best weights, {len(first)} losses and all mAPs are bit-equal to the undisturbed run's"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of its own at `folder`, or None where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run_site(folder: Path, cluster: Cluster | None, num_faults: int, rng: random.Random) -> list[Outcome]:
    place = make_place(folder)
    (place / "ds.json").write_text(json.dumps(CONFIG))
    undisturbed = Site(place, "undisturbed", None, cluster)
    finish(undisturbed)
    outcomes = []
    # hosts have mounts of their own, and would not see the disk
    with contextlib.nullcontext() if cluster else small_disk(place / "runs/stormy") as disk:
        site = Site(place, "stormy", disk, cluster)
        try:
            for outcome in storm(site, num_faults, rng):
                outcomes.append(outcome)
                print(row_of(len(outcomes), outcome), flush=True)
            finish(site)
            print(f"\n{compare(site, undisturbed)} after {len(outcomes)} faults\n", flush=True)
        finally:
            site.end_now()
    return outcomes


def row_of(number: int, outcome: Outcome) -> str:
    return (
        f"| {number} | {outcome.where} | {outcome.fault} | {outcome.moment} | {outcome.noticed_s:.1f} "
        f"| {outcome.status} | {outcome.step} | {outcome.said} |"
    )


def summary(outcomes: list[Outcome]) -> str:
    """A row for each kind of fault."""
    lines = ["| fault | times | noticed within (s) | status |", "|---|---|---|---|"]
    for where in dict.fromkeys(o.where for o in outcomes):
        for fault in dict.fromkeys(o.fault for o in outcomes if o.where == where):
            some = [o for o in outcomes if (o.where, o.fault) == (where, fault)]
            times = [o.noticed_s for o in some]
            statuses = ", ".join(sorted({str(o.status) for o in some}))
            lines.append(
                f"| {fault}, {where} | {len(some)} | {min(times):.1f} to {max(times):.1f} | {statuses} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=40, help="on one machine and on hosts together")
    parser.add_argument("--only", choices=["machine", "hosts"])
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    print(
        "| | where | fault | moment | noticed (s) | status | newest checkpoint | said |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="storm_") as folder:
        problem = why_not()
        if problem and args.only != "machine":
            print(f"no hosts: {problem}", file=sys.stderr)
        with_hosts = args.only != "machine" and not problem
        share = args.faults // 2 if with_hosts and args.only is None else args.faults
        if args.only != "hosts":
            outcomes += run_site(
                Path(folder, "machine"),
                None,
                args.faults - share if with_hosts else share,
                random.Random(args.seed),
            )
        if with_hosts:
            place = Path(folder, "hosts")
            with Cluster(2, carried={"XDG_CACHE_HOME": str(place / "cache")}) as cluster:
                outcomes += run_site(place, cluster, share, random.Random(args.seed + 1))
    print(summary(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
