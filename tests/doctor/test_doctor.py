"""`dsyolo doctor`: a healthy machine and a healthy pair pass, and each planted problem is found with its remedy.

Differences between hosts are real: in the second host's own mounts, network and processes lie another torch, another
data set, a full disk. The hosts are network namespaces: tests/support/hosts.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Cluster, why_not
from ranks import free_port
from runs import CONFIG, make_place
from torch.utils.file_baton import FileBaton

import dsyolo
from dsyolo.data import fingerprint
from dsyolo.doctor import ask, hosts, probe
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding, merged, table

ROOT = Path(dsyolo.__file__).parents[1]
needs_cluster = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set of 24 + 6 images and a DeepSpeed JSON."""
    return make_place(tmp_path_factory.mktemp("doctor"))


def doctor(place: Path, *more: object, **options: object) -> list[str]:
    given = {"deepspeed_config": place / "ds.json", "data": place / "sample/data.yaml", "model": "yolov5n"}
    given |= {"project": place / "runs", "imgsz": 64, "timeout": 40, **options}  # other tests run beside it
    arguments = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    return [sys.executable, "-m", "dsyolo.cli", "doctor", *arguments, *map(str, more)]


class Diagnosis:
    """The exit status, the output and the findings of the command."""

    def __init__(self, status: int, text: str, path: Path) -> None:
        self.status, self.text = status, text
        self.json = json.loads(path.read_text())
        self.findings = [Finding(**one) for one in self.json["checks"]]

    def of(self, check: str, verdict: str, host: str = "") -> list[Finding]:
        return [f for f in self.findings if (f.check, f.verdict, f.host) == (check, verdict, host)]

    def has(self, check: str, verdict: str, host: str, found: str, remedy: str) -> None:
        """Assert a finding whose text and remedy match these patterns, in the table too."""
        fits = [f for f in self.of(check, verdict, host) if re.search(found, f.found)]
        assert fits, f"{check} {verdict} {host} {found!r} is not in\n{self.text}"
        assert any(re.search(remedy, f.remedy) for f in fits), f"{remedy!r} is not in {fits}"
        assert re.search(rf"^{check} .*{verdict}", self.text, re.MULTILINE)


def alone(
    place: Path, tmp_path: Path, *more: object, env: dict[str, str] | None = None, **options
) -> Diagnosis:
    """Run the command on this machine."""
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **(env or {})}
    variables |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = doctor(place, *more, json=tmp_path / "doctor.json", **options)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, cwd=place)
    assert (tmp_path / "doctor.json").exists(), done.stderr
    return Diagnosis(done.returncode, done.stdout, tmp_path / "doctor.json")


# ---- one machine


def test_a_healthy_machine_passes(place, tmp_path):
    diagnosis = alone(place, tmp_path, num_gpus=2, master_port=free_port())
    assert diagnosis.status == 0, diagnosis.text
    assert diagnosis.json["can_start"]
    assert {f.verdict for f in diagnosis.findings if f.check != "slots"} == {OK}, diagnosis.text
    assert "The run can start" in diagnosis.text
    (link,) = diagnosis.of("link", OK)
    assert re.match(r"two ranks on this machine: [1-9]\d* MB/s, \d+ us, over gloo", link.found)
    diagnosis.has("torch", OK, "", re.escape(torch.__version__), "")
    diagnosis.has("deepspeed_config", OK, "", "valid for 2 ranks: 8 images a step", "")
    diagnosis.has("data", OK, "", "train: 24 images .*; val: 6 images", "")


@pytest.mark.soak
def test_values_that_are_left_to_the_run_are_no_fault(place, tmp_path):
    content = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 12,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "_comment": "of the old cluster",
    }
    (tmp_path / "auto.json").write_text(json.dumps(content))
    diagnosis = alone(
        place, tmp_path, num_gpus=2, master_port=free_port(), deepspeed_config=tmp_path / "auto.json"
    )
    assert diagnosis.status == 0, diagnosis.text
    aside = r"images a step; set aside, without effect here: _comment \(a comment\)"
    diagnosis.has("deepspeed_config", OK, "", aside, "")
    (tmp_path / "auto.json").write_text(json.dumps({**content, "gradient_clippping": "auto"}))
    diagnosis = alone(
        place, tmp_path, num_gpus=2, master_port=free_port(), deepspeed_config=tmp_path / "auto.json"
    )
    diagnosis.has(
        "deepspeed_config", FAIL, "", "auto.json: gradient_clippping: unknown key", "gradient_clipping"
    )


def test_what_is_planted_on_one_machine_is_found(place, tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                **CONFIG,
                "train_batch_size": 9,
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            }
        )
    )
    (tmp_path / "data.yaml").write_text(
        f"path: {place}/sample\ntrain: images/train\nval: images/nothing\nnames: [a]\n"
    )
    (tmp_path / "file").write_text("")
    locked = stale_lock(tmp_path / "extensions" / "cpu_adam")
    building = tmp_path / "extensions" / "fused_adam"
    building.mkdir()
    baton = FileBaton(str(building / "lock"))
    assert baton.try_acquire()  # as torch does for a build
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
        env["GLOO_SOCKET_IFNAME"] = "enp9"
        options = {"deepspeed_config": tmp_path / "ds.json", "data": tmp_path / "data.yaml"}
        diagnosis = alone(
            place,
            tmp_path,
            "--fix",
            env=env,
            num_gpus=2,
            master_port=port,
            project=tmp_path / "file/runs",
            **options,
        )
    baton.release()
    assert diagnosis.status == 1
    assert not diagnosis.json["can_start"]
    diagnosis.has("deepspeed_config", FAIL, "", "train_batch_size: 9 given, but", "Set it|Give")
    diagnosis.has("deepspeed_config", FAIL, "", "ds.json: .*ratio: 0.5 given", "Leave it out")
    diagnosis.has(
        "ops",
        FAIL,
        "",
        "offload_optimizer.ratio needs cpu_adam, but there is no C\\+\\+ compiler",
        "Or install g",
    )
    diagnosis.has("data", FAIL, "", "data.yaml: .*images/nothing does not exist", "")
    diagnosis.has("disk", FAIL, "", "file/runs: cannot be written to", "--project")
    diagnosis.has(
        "interface", FAIL, "", "GLOO_SOCKET_IFNAME=enp9: enp9 is not among .*lo", "Set GLOO_SOCKET_IFNAME="
    )
    diagnosis.has(
        "port", FAIL, "", rf"{port}: Address already in use, taken by process {os.getpid()}", "--master_port"
    )
    diagnosis.has("locks", OK, "", re.escape(f"{locked}: removed"), "")
    diagnosis.has("locks", OK, "", rf"{building}/lock: held by process {os.getpid()}", "")
    diagnosis.has("link", WARNING, "", "not measured, because of interface, port", "Fix")
    assert not locked.exists()
    assert (building.exists(), list(building.iterdir())) == (True, [])  # our own release, not the doctor


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--master_port", "70000"], "--master_port: 70000 given"),
        (["--timeout", "0"], "--timeout: 0 given"),
        (["--imgsz", "65"], "--imgsz: 65 given, but the images of yolov5n must be a multiple of 32"),
        (["--num_gpus", "2", "--hostfile", "x"], "--num_gpus: 2 given"),
        (["--workers", "-1"], "--workers: -1 given"),
        (["--json", "{file}/x.json"], "is a file, and a folder is needed there"),
        (["--json", "{other}"], "it holds something else than such a report. Name another file."),
        (["--model", "yolov9"], "--model: yolov9 given, but it must be one of yolov5n"),
    ],
)
def test_a_mistake_in_the_command_line_is_no_finding(tmp_path, capsys, option, message):
    from dsyolo.cli import main

    (tmp_path / "file").write_text("")
    (tmp_path / "other").write_text("weights", encoding="utf-8")
    places = {name: tmp_path / name for name in ("file", "other")}
    assert main(["doctor", *(part.format(**places) for part in option)]) == 2
    assert message in capsys.readouterr().err


# ---- locks, by the probe itself


def stale_lock(folder: Path, age_s: float = 7200) -> Path:
    """The lock that a killed build leaves."""
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - age_s,) * 2)
    return folder / "lock"


def probed(section: str, env: dict[str, str], **request: Any) -> dict[str, Any]:
    """Return a section of the probe, as a host answers it."""
    given = json.dumps({"sections": [section], **request})
    done = subprocess.run(
        [sys.executable, "-", given],
        input=Path(probe.__file__).read_text(),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("by", ["waiting", "building", "killed"])
def test_a_lock_goes_only_when_nobody_builds(tmp_path, by):
    folder = tmp_path / "op"
    folder.mkdir()
    holds = f"""
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton({str(folder / "lock")!r})
print(baton.try_acquire(), flush=True)
baton.wait() if {by == "waiting"} else time.sleep(60)
"""
    if by == "waiting":  # for a build that was killed, as a run does that needs the op
        stale_lock(tmp_path / "made").rename(folder / "lock")
    process = subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == str(by != "waiting")
    if by == "killed":
        process.kill()
        process.wait()
    try:
        env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
        (seen,) = probed("locks", env, fix=False)["locks"]
        assert (folder / "lock").exists()
        assert seen["state"] == (
            f"held by process {process.pid} ({Path(sys.executable).name})" if by == "building" else "stale"
        )
        (seen,) = probed("locks", env, fix=True)["locks"]
        assert seen["state"] == (
            f"held by process {process.pid} ({Path(sys.executable).name})" if by == "building" else "removed"
        )
        assert list(folder.iterdir()) == ([folder / "lock"] if by == "building" else [])
        if by == "waiting":
            assert process.wait(10) == 0  # and goes on
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("kind", "sees_all", "quiet_s", "state"),
    [
        ("nfs4", True, 60, "perhaps held: another host or container"),
        ("nfs4", True, 7200, None),
        ("ext4", False, 60, "perhaps held: another host or container"),
        ("ext4", False, 7200, None),
        ("ext4", True, 60, None),
    ],
)
def test_where_builds_of_others_cannot_be_seen_a_lock_must_be_old(
    tmp_path, monkeypatch, kind, sees_all, quiet_s, state
):
    lock = stale_lock(tmp_path / "op", quiet_s)
    monkeypatch.setattr(probe, "_file_system", lambda _: kind)
    monkeypatch.setattr(probe, "_sees_all_processes", lambda: sees_all)
    assert (probe._may_be_held(lock, lock.stat()) or "").startswith(state or "")
    assert bool(probe._may_be_held(lock, lock.stat())) == bool(state)
    if state is None:  # an object file that a build is writing
        (lock.parent / "op.o").touch()
        assert bool(probe._may_be_held(lock, lock.stat())) == ((kind, sees_all) != ("ext4", True))


def test_a_lock_that_changes_hands_is_put_back(tmp_path, monkeypatch):
    lock = stale_lock(tmp_path / "op")
    before = lock.stat()
    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert probe._remove(lock, before) == "held by a build that has just begun"
    assert list(lock.parent.iterdir()) == [lock]
    baton.release()


# ---- hostfile and environment


@pytest.mark.parametrize(
    ("text", "found", "remedy"),
    [
        ("node1 slots=2\nnode1 slots=4\n", "line 2: node1 is listed twice", "Remove one"),
        ("node1 slots=0\n", "line 1: node1 has slots=0", "Remove the line"),
        ("# mine\nnode1 2\n", "line 2: 'node1 2' is not a host and its slots", "node1 slots=8"),
        ("node1 slots=2x\n", "line 1: slots=2x, which the launcher reads as 2", "whole number"),
        ("node[1-4] slots=2\n", "line 1: 'node[1-4]' is not the name of one host", "its own line"),
        ("-oProxyCommand=reboot slots=2\n", "is not the name of one host", "its own line"),
        ("\n# nothing\n", "names no host", "Add lines"),
        (None, "does not exist", "Check --hostfile"),
        (b"\xff\xfe", "begins with a byte-order mark", "Save it as UTF-8"),
        (b"n\xe4 slots=2\n", "cannot be read: not in UTF-8", "iconv -f"),
    ],
)
def test_what_is_wrong_with_a_hostfile_is_named(tmp_path, capsys, text, found, remedy):
    from dsyolo.cli import main

    file = tmp_path / "hostfile"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    _, findings = hosts.read_hostfile(file)
    assert len(findings) == 1
    assert findings[0].verdict == FAIL
    assert found in findings[0].found
    assert remedy in findings[0].remedy
    if not hosts.read_hostfile(file)[0]:
        assert main(["doctor", "--hostfile", str(file)]) == 1
        assert "The run cannot start: 1 FAIL." in capsys.readouterr().out


def test_hostfile_and_environment_are_read_as_the_launcher_does(tmp_path, monkeypatch):
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher import runner

    assert set(hosts.FORWARDED_PREFIXES) == {*runner.EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)}
    text = "# a cluster\nnode1 slots=2\n\n  user@node2.local   slots=16 max_slots=16\n"
    (tmp_path / "hostfile").write_text(text)
    found, (finding,) = hosts.read_hostfile(tmp_path / "hostfile")
    assert finding.verdict == OK
    assert {host.name: host.slots for host in found} == runner.fetch_hostfile(str(tmp_path / "hostfile"))
    for bad in ("node1 slots=2\nnode1 slots=2\n", "node1\n", "\n"):
        with pytest.raises(ValueError, match="Hostfile"):
            runner._parse_hostfile(bad.splitlines())
        (tmp_path / "hostfile").write_text(bad)
        assert hosts.read_hostfile(tmp_path / "hostfile")[1][0].verdict == FAIL

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n\n# why\n#X=1\n")
    forwarded = hosts.read_forwarded()
    assert forwarded.variables["GLOO_SOCKET_IFNAME"] == "eth0"
    assert forwarded.variables["NCCL_DEBUG"] == "WARN"
    assert forwarded.variables["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert "UNRELATED" not in forwarded.variables
    assert [f.found.rpartition("line ")[2][0] for f in forwarded.findings] == ["2", "3", "4"]
    assert {f.verdict for f in forwarded.findings} == {FAIL}
    line = hosts.remote_command(
        "/bin/python", hosts.ForwardedEnvironment({"A": "x y", "B": "1"}, ()), ["-", '{"a": 1}']
    )
    assert line.startswith('export A="x y"; export B=1; cd ')
    assert line.endswith("exec /bin/python - '{\"a\": 1}'")


# ---- the fingerprint


def test_a_fingerprint_sees_names_sizes_and_labels(place, tmp_path):
    def of(folder: Path) -> dict[str, Any]:
        return fingerprint.of_data(str(folder / "data.yaml"))["splits"]

    # Paths are part of it, since a run has the same on all hosts: the copies take the place of the original.
    shutil.copytree(place / "sample", tmp_path / "kept")
    work = tmp_path / "sample"
    shutil.copytree(place / "sample", work)
    before = of(work)
    image = next(iter(sorted((work / "images/train").iterdir())))
    label = work / "labels/train" / f"{image.stem}.txt"
    assert label.read_text()
    changes = {
        "removed": image.unlink,
        "cut": lambda: image.write_bytes(image.read_bytes()[:-1]),
        "relabelled": lambda: label.write_text(
            str((int(label.read_text()[0]) + 1) % 5) + label.read_text()[1:]
        ),
        "unlabelled": label.unlink,
        "added": lambda: shutil.copy(image, image.with_name("more.jpg")),
    }
    for name, change in changes.items():
        change()
        after = of(work)
        assert after["val"] == before["val"], name
        odd = [
            i
            for i, (a, b) in enumerate(
                zip(after["train"]["buckets"], before["train"]["buckets"], strict=True)
            )
            if a != b
        ]
        assert len(odd) == 1, name
        shutil.rmtree(work)
        shutil.copytree(tmp_path / "kept", work, copy_function=shutil.copy2)
        assert of(work) == before


def test_of_many_images_a_part_is_looked_at_and_all_are_named(monkeypatch):
    images = [f"/nowhere/images/{i}.jpg" for i in range(5000)]
    monkeypatch.setattr(fingerprint, "MAX_SIZES", 1000)
    monkeypatch.setattr(fingerprint, "MAX_READ", 100)
    looked, stat = [], os.stat
    monkeypatch.setattr(fingerprint.os, "stat", lambda path: looked.append(str(path)) or stat(path))
    found = fingerprint.fingerprint(images)
    assert found["one_in"] == {"sizes": 8, "labels": 64}
    assert 400 < sum(path.endswith(".jpg") for path in looked) < 850
    reordered = fingerprint.fingerprint(images[::-1])
    assert reordered == found
    fewer = fingerprint.fingerprint(images[:77] + images[78:])
    (odd,) = [i for i, (a, b) in enumerate(zip(found["buckets"], fewer["buckets"], strict=True)) if a != b]
    assert images[77] in fingerprint.listed(images, [odd])
    assert len(fingerprint.listed(images, [odd])) < 30


# ---- the table


def test_hosts_with_the_same_share_a_line_and_nobody_steers_the_terminal():
    same = [Finding("torch", f"n{i}", OK, "2.13") for i in range(6)]
    odd = Finding("torch", "n6", FAIL, "2.12\x1b[2J\nOK", "Install it.")
    names = [f"n{i}" for i in range(7)]
    lines = merged([*same, odd], names)
    assert [line.host for line in lines] == ["n0, n1, n2 and 3 more", "n6"]
    assert [
        line.host for line in merged([*same, odd._replace(verdict=OK, found="2.13", remedy="")], names)
    ] == [""]
    text = table(lines)
    assert "\x1b" not in text
    assert "2.12\\x1b[2J OK" in text
    assert "-> Install it." in text
    assert text.endswith("The run cannot start: 1 FAIL.")


# ---- what comes back from a host


def replied(
    tmp_path: Path, monkeypatch, program: str, sections: tuple[str, ...] = ("hello", "python")
) -> ask.Reply:
    """Return the reply of a Python program in place of the probe, on this machine."""
    monkeypatch.setattr(ask, "SECTION_S", 1)
    query = ask.Query(hosts.LOCAL, ["-"], sections, program.encode())
    return ask.ask({"n": query}, hosts.ForwardedEnvironment({}, ()), 5)["n"]


HELLO = """print('{"section": "hello", "time": 0, "hostname": "h", "machine": "m", "network": "n"}', flush=True)\n"""


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ('print(\'{"section": "hello", "time": "soon"}\')', "is not valid"),
        ("print('{\"section\": [1]}')", "is not valid"),
        ('print(\'{"section": "python"}\')', "is not valid"),  # out of turn
        ("print('{\"section\": ' + '[' * 200_000)", "is not valid"),
        ("print('{\"section\": \"' + 'x' * 9_000_000)", "is not valid"),
        ("import itertools\nfor _ in itertools.count(): print('welcome')", "no answer within 5 s"),
        ("import time; time.sleep(60)", "no answer within 5 s"),
        (HELLO + "import time; time.sleep(60)", "no answer from the section 'python'"),
        (HELLO + "print('x'); raise SystemExit('no such thing')", "status 1: no such thing"),
    ],
)
def test_an_invalid_answer_is_a_fault_with_a_remedy_within_seconds(tmp_path, monkeypatch, program, fault):
    begin = time.monotonic()
    reply = replied(tmp_path, monkeypatch, program)
    assert fault in reply.fault
    assert reply.remedy
    assert time.monotonic() - begin < 12
    assert ("hello" in reply.sections) == program.startswith(HELLO)


@pytest.mark.parametrize(
    ("stderr", "status", "found", "remedy"),
    [
        ("Host key verification failed.", 255, "Host key verification failed.", "ssh-keyscan far"),
        ("far: Permission denied (publickey).", 255, "Permission denied", "ssh-copy-id far"),
        ("Could not resolve hostname far", 255, "Could not resolve", "ssh -p 7 -o BatchMode=yes .* far true"),
        ("bash: no such folder", 97, f"the folder {re.escape(os.getcwd())} is missing", "same folder"),
        ("bash: no python", 96, f"{sys.executable} is missing", "same interpreter"),
    ],
)
def test_errors_of_ssh_become_remedies(tmp_path, monkeypatch, stderr, status, found, remedy):
    (tmp_path / "ssh").write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit {status}\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 7")
    query = ask.probe_query("far", {"sections": []})
    reply = ask.ask({"far": query}, hosts.ForwardedEnvironment({}, ()), 10)["far"]
    assert re.search(found, reply.fault)
    assert re.search(remedy, reply.remedy)


def test_the_exit_status_of_the_remote_command_shows_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forwarded = hosts.ForwardedEnvironment({"HOW": "a b"}, ())
    lines = {
        0: hosts.remote_command(
            sys.executable, forwarded, ["-c", "import os; assert os.environ['HOW'] == 'a b'"]
        ),
        96: hosts.remote_command("/nowhere/python", forwarded, ["-c", "1"]),
        97: hosts.remote_command(sys.executable, forwarded, ["-c", "1"]).replace(str(tmp_path), "/nowhere"),
    }
    for status, line in lines.items():
        assert subprocess.run(["sh", "-c", line]).returncode == status


# ---- several hosts


@pytest.fixture(scope="module")
def pair():
    with Cluster(2) as cluster:
        yield cluster


def over(
    cluster: Cluster, place: Path, tmp_path: Path, *more: object, hostfile: Path | None = None, **options
) -> Diagnosis:
    """Run the command on the first host, for all of them."""
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    given = {"hostfile": hostfile or cluster.hostfile(1), "master_addr": cluster.addresses[0], **options}
    command = doctor(place, *more, json=tmp_path / "doctor.json", **given)
    pipe = subprocess.PIPE
    process = cluster.popen(command, env=env, cwd=place, stdout=pipe, stderr=pipe, text=True)
    text, errors = process.communicate(timeout=100)
    assert (tmp_path / "doctor.json").exists(), errors
    return Diagnosis(process.returncode, text, tmp_path / "doctor.json")


@needs_cluster
def test_a_healthy_pair_passes(pair, place, tmp_path):
    diagnosis = over(pair, place, tmp_path)
    assert diagnosis.status == 0, diagnosis.text
    assert diagnosis.json["hosts"] == ["node0", "node1"]
    assert [f.check for f in diagnosis.findings if f.verdict != OK] == ["launcher"], diagnosis.text
    diagnosis.has("launcher", WARNING, "", "by plain ssh, without PDSH_SSH_ARGS_APPEND", "--no_ssh_check")
    diagnosis.has("launcher", OK, "", "pdsh reaches all hosts", "")
    diagnosis.has("master", OK, "", "rendezvous at 10.77.0.1, port 29500", "")
    diagnosis.has("interface", OK, "node1", "eth0, 10.77.0.2, from GLOO_SOCKET_IFNAME", "")
    diagnosis.has("link", OK, "", r"node0 to node1: [1-9]\d* MB/s", "")
    diagnosis.has("project", OK, "", "all hosts share ", "")
    diagnosis.has("data", OK, "", "the same train: 24 images", "")
    assert not list((place / "runs").glob("*")), "nothing is left behind"


@needs_cluster
def test_a_second_host_that_differs_is_named_in_all_ways(place, tmp_path):
    """Seven problems at once, all of them on one host."""
    shutil.copytree(place / "sample", tmp_path / "sample")
    lost = sorted((tmp_path / "sample/images/val").iterdir())[2]
    lost.unlink()
    version = Path(torch.__file__).with_name("version.py")
    (tmp_path / "version.py").write_text(
        version.read_text().replace(torch.__version__.split("+")[0], "2.99.0")
    )
    loss = Path(dsyolo.__file__).parent / "detection" / "loss.py"
    (tmp_path / "loss.py").write_text(loss.read_text() + "# mine\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n_now = time.time\ntime.time = lambda: _now() + 90\n"
    )
    lock = stale_lock(tmp_path / "extensions" / "op")
    (place / "runs").mkdir(exist_ok=True)
    with Cluster(2, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "other")}) as cluster:
        (tmp_path / "other").mkdir()
        (tmp_path / "ahead").mkdir()
        planted = (
            f"mount --bind {tmp_path}/version.py {version}; mount --bind {tmp_path}/loss.py {loss}; "
            f"mount --bind {tmp_path}/sample {place}/sample; mount --bind {tmp_path}/extensions {tmp_path}/other; "
            f"mount -t tmpfs -o size=1m tmpfs {place}/runs; mount -t tmpfs -o size=64k tmpfs /dev/shm; "
            f"mount -t tmpfs tmpfs {tmp_path}/ahead; cp {tmp_path}/sitecustomize.py {tmp_path}/ahead; "
            "ip link set eth0 down; ip link set eth0 name ens3; ip link set ens3 up"
        )
        cluster.run(1, f"set -e; {planted}")
        cluster.environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}/ahead"
        diagnosis = over(cluster, place, tmp_path)
        assert diagnosis.status == 1
        diagnosis.has("torch", FAIL, "node1", "2.99.0.*, but 2.* on node0", "Install torch==2")
        diagnosis.has("dsyolo", FAIL, "node1", "loss.py in .*dsyolo differs from node0", "git status")
        diagnosis.has(
            "data", FAIL, "node1", f"val: {place}/sample/images/val/{lost.name} is missing", "rsync"
        )
        diagnosis.has(
            "disk",
            FAIL,
            "node1",
            r"runs: 1.0 MiB free, but \d+\.\d MiB needed for 3 checkpoints",
            "Free space",
        )
        diagnosis.has("shm", FAIL, "node1", "/dev/shm: 64 KiB free, up to", "--shm-size")
        diagnosis.has("clock", WARNING, "node1", r"(89|90)\.\d s ahead", "chrony")
        diagnosis.has(
            "locks", WARNING, "node1", f"{tmp_path}/other/op/lock: stale, owned by root, 2 h old", "--fix"
        )
        diagnosis.has("interface", FAIL, "node1", "eth0 is not among lo, ens3", "GLOO_SOCKET_IFNAME=ens3")
        diagnosis.has("link", WARNING, "", "not measured, because of torch, dsyolo, interface", "Fix")
        assert {f.host for f in diagnosis.findings if f.verdict != OK} == {"node1", ""}
        assert lock.exists()
        assert diagnosis.of("slots", OK), "what is well is reported too"


@needs_cluster
@pytest.mark.soak
def test_hosts_that_cannot_be_had_cost_seconds(pair, place, tmp_path):
    """One that no packet reaches, one whose sshd hangs, one that is another's second name, one twice, one of no ranks."""
    hostfile = tmp_path / "hostfile"
    lines = (
        "node0 slots=1\nnode1 slots=1\n10.77.0.1 slots=1\n10.77.0.99 slots=1\nnode1 slots=2\nnode2 slots=0\n"
    )
    hostfile.write_text(lines)
    (tmp_path / "ds.json").write_text(json.dumps({**CONFIG, "train_batch_size": 10}))
    begin = time.monotonic()
    pair.run(1, "pkill -STOP sshd")
    try:
        options = {"timeout": 8, "deepspeed_config": tmp_path / "ds.json", "master_port": 22}
        diagnosis = over(pair, place, tmp_path, hostfile=hostfile, **options)
    finally:
        pair.run(1, "pkill -CONT sshd")
    assert time.monotonic() - begin < 40
    assert diagnosis.status == 1
    diagnosis.has("hostfile", FAIL, "", "line 5: node1 is listed twice", "Remove one")
    diagnosis.has("hostfile", FAIL, "", "line 6: node2 has slots=0", "Remove the line")
    diagnosis.has("hostfile", FAIL, "10.77.0.1", "the same machine as node0", "Remove one")
    diagnosis.has("ssh", FAIL, "10.77.0.99", "No route to host|timed out", "ssh .*10.77.0.99 true")
    diagnosis.has("ssh", FAIL, "node1", "no answer within 8 s|timed out", "--timeout|true")
    diagnosis.has("launcher", FAIL, "", "pdsh does not reach .*10.77.0.99", "PDSH_RCMD_TYPE=ssh pdsh")
    diagnosis.has("deepspeed_config", FAIL, "node0, 10.77.0.1", "train_batch_size: 10 given", "")
    diagnosis.has(
        "port", FAIL, "node0", "22: Address already in use, taken by process .*sshd", "--master_port"
    )


@needs_cluster
@pytest.mark.soak
def test_a_slow_link_and_folders_apart_are_seen(pair, place, tmp_path):
    (tmp_path / "runs").mkdir()
    pair.run(1, f"mount -t tmpfs tmpfs {tmp_path}/runs")
    try:
        pair.run(1, "tc qdisc add dev eth0 root tbf rate 80mbit burst 32kbit latency 400ms")
    except RuntimeError as error:
        pytest.skip(f"no traffic shaping here: {error}")
    try:
        diagnosis = over(pair, place, tmp_path, project=tmp_path / "runs", hostfile=pair.hostfile(2))
    finally:
        pair.run(1, f"tc qdisc del dev eth0 root; umount {tmp_path}/runs")
    assert diagnosis.status == 1
    diagnosis.has("project", FAIL, "node1", "not the same folder as on node0", "--project")
    diagnosis.has("link", OK, "", "two ranks on node0: ", "")
    diagnosis.has("link", WARNING, "", r"node1 to node0: \d\.?\d? MB/s, .*: less than 100 MB/s", "switch")
    assert [f.check for f in diagnosis.findings if f.verdict == FAIL] == ["project"]


@needs_cluster
@pytest.mark.soak
def test_a_host_name_that_is_loopback_is_found_before_ranks_fail_of_it(place, tmp_path):
    with Cluster(2) as cluster:
        file = Path(cluster.environment["DS_ENV_FILE"])
        file.write_text(file.read_text().replace("GLOO_SOCKET_IFNAME=eth0\n", "WITH_A_SPACE=a b\n"))
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node1 node0\n")  # as Debian writes it
        cluster.run(1, f"mount --bind {tmp_path}/hosts /etc/hosts")
        diagnosis = over(cluster, place, tmp_path, master_addr=cluster.addresses[1])
    assert diagnosis.status == 1
    diagnosis.has(
        "master",
        FAIL,
        "",
        "rendezvous at 10.77.0.2, port 29500, which is an address of node1",
        "another address of node0: 10.77.0.1",
    )
    diagnosis.has(
        "interface",
        FAIL,
        "node1",
        "127.0.1.1, from the host's name",
        "Put GLOO_SOCKET_IFNAME=eth0 into",
    )
    diagnosis.has("interface", FAIL, "node1", "", "It is eth0 here, but not forwarded")
    diagnosis.has("interface", OK, "node0", "10.77.0.1, from the host's name", "")
    diagnosis.has("names", WARNING, "node1", "node0 is 127.0.1.1, which is this host itself", "/etc/hosts")


@needs_cluster
@pytest.mark.soak
def test_an_interface_that_does_not_lead_to_the_others_is_found_by_trying(place, tmp_path):
    with Cluster(2, {"GLOO_SOCKET_IFNAME": "docker0"}) as cluster:
        for host in (0, 1):  # the same address on each, as Docker's bridge has it
            cluster.run(
                host,
                "ip link add docker0 type veth peer name container; ip link set container up; ip address add 172.17.0.1/16 dev docker0; ip link set docker0 up",
            )
        diagnosis = over(cluster, place, tmp_path)
    assert diagnosis.status == 1
    diagnosis.has("interface", OK, "", "docker0, 172.17.0.1, from GLOO_SOCKET_IFNAME", "")
    diagnosis.has("link", FAIL, "node0", "cannot connect to the ranks of node1", "GLOO_SOCKET_IFNAME")
    diagnosis.has("link", FAIL, "node1", "cannot connect to the ranks of node0", "GLOO_SOCKET_IFNAME")
