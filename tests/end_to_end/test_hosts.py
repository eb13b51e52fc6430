"""Hosts of their own (namespaces with an sshd each), real launchers across them: same training, no byte too many."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import traffic
from hosts import INTERFACE, Cluster, why_not
from ranks import free_port
from runs import CONFIG, ROOT, TRAIN, arguments, environment, losses, make_place, rows

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
PIPELINE = {**CONFIG, "zero_optimization": {"stage": 1}, "pipeline": {"stages": 2}}
EPOCHS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("cluster"))
    (place / "pipeline.json").write_text(json.dumps(PIPELINE))
    return place


@pytest.fixture(scope="module")
def cluster(place):
    with Cluster(2, carried={"XDG_CACHE_HOME": str(place / "cache")}) as cluster:
        yield cluster


def on_one_host(place: Path, name: str, **options: object) -> str:
    """Two ranks here; without a launcher, which takes longer to import than the training."""
    command = [
        sys.executable,
        str(ROOT / "launch/ranks.py"),
        "--ranks",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [str(TRAIN), *arguments(place, name, epochs=EPOCHS, **options)]
    done = subprocess.run(
        command, env=environment(place), capture_output=True, text=True, timeout=200, cwd=place
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return name


def finished(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    return said


def started(cluster: Cluster, command: list[str], place: Path, **options: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return cluster.popen(command, cwd=place, **pipes, **options)


def assert_same(place: Path, name: str, other: str) -> None:
    """Losses of all steps to 1e-6, and the figures of all validations."""
    first, second = losses(place, name), losses(place, other)
    assert len(first) == len(second) == 3 * EPOCHS
    np.testing.assert_allclose(first, second, rtol=1e-6)
    figures = [
        [{k: row[k] for k in ("map50", "map50_95")} for row in rows(place, n, "epoch")] for n in (name, other)
    ]
    assert len(figures[0]) == EPOCHS
    assert figures[0] == figures[1]


# ---- the box itself


def test_hosts_are_apart_and_see_each_other(cluster):
    hosts = range(len(cluster.names))
    assert [cluster.run(host, "hostname").strip() for host in hosts] == cluster.names
    assert os.uname().nodename not in cluster.names
    assert all(len(cluster.run(host, "ps -e --no-headers").splitlines()) < 12 for host in hosts)
    sees = "timeout 1 bash -c '</dev/tcp/node1/22' && echo yes || echo no"
    assert cluster.run(0, sees).strip() == "yes"
    cluster.link(1, up=False)
    assert cluster.run(0, sees).strip() == "no"
    cluster.link(1, up=True)
    assert cluster.run(0, sees).strip() == "yes"


def test_nothing_of_this_machine_is_changed_and_nothing_stays_even_after_a_kill():
    script = """
import sys
from hosts import Cluster
with Cluster(2) as cluster:
    print(*cluster.pids(0), *cluster.pids(1), cluster.folder, flush=True)
    sys.stdin.read()
"""
    view = "ip -oneline link; ip address; ip route; ip netns; cat /proc/mounts"
    before = subprocess.check_output(view, shell=True)
    path = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as maker:
        *pids, folder = maker.stdout.readline().split()
        assert len(pids) >= 4
        assert subprocess.check_output(view, shell=True) == before
        maker.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert subprocess.check_output(view, shell=True) == before
    subprocess.run(["rm", "-r", folder], check=True)  # a temporary folder is all that such an end leaves


# ---- training across hosts


@pytest.fixture(scope="module")
def zero2(place):
    return on_one_host(place, "zero2")


def test_zero2_by_hostfile_is_the_training_of_one_host(place, cluster, zero2):
    """By launch/hostfile.sh, with the example's variables."""
    example = (ROOT / "launch/deepspeed_env.example").read_text()
    assert "\nGLOO_SOCKET_IFNAME=eth0\n" in example
    assert INTERFACE == "eth0"
    own = example.replace("#DS_ACCELERATOR=", "DS_ACCELERATOR=").replace("/local/cache", str(place / "cache"))
    (place / "deepspeed_env").write_text(own)
    told = {
        "HOSTFILE": str(cluster.hostfile()),
        "ENV_FILE": str(place / "deepspeed_env"),
        "CONFIG": str(place / "ds.json"),
        "MASTER_ADDR": cluster.addresses[0],
    }
    command = [str(ROOT / "launch/hostfile.sh"), *arguments(place, "hostfile", epochs=EPOCHS)]
    before = cluster.traffic()
    process = started(cluster, command, place, env=told)
    hosts: set[int] = set()
    while process.poll() is None and len(hosts) < 2:
        ranks = cluster.ranks()
        hosts = {host for host in (0, 1) for pid in ranks.values() if pid in cluster.pids(host)}
        time.sleep(0.2)
    said = finished(process)
    assert hosts == {0, 1}  # a rank on each
    assert "node0: ZeRO 2" in said
    assert_same(place, "hostfile", zero2)
    gradients = 4 * 1_770_682 * len(losses(place, "hostfile"))
    assert all(min(now) - max(then) > gradients for now, then in zip(cluster.traffic(), before, strict=True))


@pytest.mark.soak
def test_a_pipeline_by_hostfile_is_the_training_of_one_host(place, cluster):
    config = {"deepspeed_config": place / "pipeline.json"}
    words = arguments(place, "stages_on_two", epochs=EPOCHS, **config)
    said = finished(started(cluster, [*cluster.deepspeed(), str(TRAIN), *words], place))
    assert "pipeline: 2 stages" in said
    assert_same(place, "stages_on_two", on_one_host(place, "stages_on_one", **config))


@pytest.mark.soak
def test_torchrun_on_two_hosts_is_the_training_of_one_host(place, cluster, zero2):
    told = {
        **{name: cluster.environment[name] for name in ("PATH", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR")},
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": place / "cache",
        "NODES": 2,
        "MEET": "node0:29400",
        "RANKS": 1,
        "CONFIG": place / "ds.json",
    }
    words = ["env", *(f"{key}={value}" for key, value in told.items())]
    words += [str(ROOT / "launch/torchrun.sh"), *arguments(place, "torchrun", epochs=EPOCHS)]
    both = [started(cluster, cluster.ssh(host, words), place) for host in (0, 1)]
    for process in both:
        finished(process)
    assert_same(place, "torchrun", zero2)


@pytest.mark.soak
def test_four_hosts_train_as_one(place, zero2):
    with Cluster(4, carried={"XDG_CACHE_HOME": str(place / "cache")}) as four:
        words = arguments(place, "four", epochs=1)
        said = finished(started(four, [*four.deepspeed(), str(TRAIN), *words], place))
    assert "8 images per step = 2 per GPU x 1 accumulation x 4 ranks" in said
    # BatchNorm's groups are the same, so only rounding differs
    np.testing.assert_allclose(losses(place, "four"), losses(place, zero2)[:3], rtol=1e-3)


@pytest.mark.soak
def test_a_step_sends_what_the_formula_says(cluster):
    steps = 3
    words = ["--model", "yolov5n", "--steps", str(steps), "--stages", "0", "1", "2", "3"]
    found = traffic.across(cluster, *words, place=cluster.folder)
    size = traffic.gradient_bytes("yolov5n")
    for stage, hosts in found.items():
        expected = traffic.formula(stage, size, ranks=2)
        for way in [way / steps for host in hosts for way in host]:
            assert way == pytest.approx(expected, rel=0.1), f"ZeRO {stage}"


@pytest.mark.soak
def test_a_folder_that_hosts_do_not_share_is_reported_before_anything_is_read(place, cluster):
    project = place / "apart"
    project.mkdir()
    cluster.run(1, f"mount -t tmpfs tmpfs {project}")
    words = arguments(place, "apart", project=project)
    process = started(cluster, [*cluster.deepspeed(), "--master_port", "29763", str(TRAIN), *words], place)
    said = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert said.count("apart is not one folder for all hosts") == 1, said
    assert "node1 does not see the files that rank 0 writes there. Put --project on storage" in said
    assert "Traceback" not in said
    assert list(project.iterdir()) == []


@pytest.mark.soak
def test_sigterm_to_deepspeed_saves_on_all_hosts(place, cluster):
    """It ends pdsh, and with it whoever reads what ranks print, before they hear of it."""
    words = [*arguments(place, "stopped", epochs=200), "--resume", "auto"]
    process = started(cluster, [*cluster.deepspeed(), str(TRAIN), *words], place)
    metrics, end = place / "runs/stopped/metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and '"kind": "epoch", "step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    process.stdout.close()  # so that even pdsh's own last words are lost
    process.terminate()
    while cluster.ranks() or process.poll() is None:
        assert time.monotonic() < end + 60
        time.sleep(0.1)
    newest = max((place / "runs/stopped/checkpoints").glob("step_*"))
    saved = json.loads((newest / "progress.json").read_text())["progress"]["step"]
    assert [row[0] for row in losses(place, "stopped")] == list(range(1, saved + 1))
