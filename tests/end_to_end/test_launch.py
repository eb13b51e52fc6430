"""launch/: that each file says what its system reads, and runs."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ranks import free_port, long_but
from runs import ROOT, arguments, environment, losses, make_place

from dsyolo.cluster import preemption as stop
from dsyolo.config import cli_args

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
# What srun would do: the tasks of a step, told their places by Slurm's variables, SIGTERM passed on, the highest status.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=0 ]] || exit 99
shift
trap 'kill -TERM "${tasks[@]}"' TERM
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > tasks
status=0
for task in "${tasks[@]}"; do
    code=0
    wait "$task" || code=$?
    while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done
    (( code > status )) && status=$code
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol_was_told
if [[ $1 == show ]]; then printf '127.0.0.1\\nanother\\n'; fi
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_safe_to_run_again(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "--resume auto" in text
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("script", ["one_machine.sh", "torchrun.sh"])
@pytest.mark.parametrize("ranks", long_but(["0", "abc"], ["0", "-1", "abc", "2 3"]))
def test_a_number_of_ranks_that_is_none_is_refused(script, ranks):
    env = {**os.environ, "RANKS": ranks, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([str(LAUNCH / script)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"RANKS: {ranks} given" in done.stderr


def documents() -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_the_manifest_is_an_indexed_job_that_meets_at_pod_0():
    service, job = documents()
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None"
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["template"]["metadata"]["labels"] == service["spec"]["selector"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-u", "launch/ranks.py"]
    words = dict(word.removeprefix("--").split("=", 1) for word in container["args"] if "=" in word)
    name = job["metadata"]["name"]
    assert words["master_addr"] == f"{name}-0.{service['metadata']['name']}"
    assert words["node"] == "$(JOB_COMPLETION_INDEX)"
    assert words["nodes"] == str(spec["completions"]) == str(spec["parallelism"])
    assert words["ranks"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted.keys() == volumes.keys()
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert mounted["shm"] == "/dev/shm"
    assert "persistentVolumeClaim" in volumes["data"]
    assert all(words[key].startswith(mounted["data"]) for key in ("data", "project"))


def test_the_manifest_makes_a_stopped_pod_again_and_gives_up_on_a_mistake():
    spec = documents()[1]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["terminationGracePeriodSeconds"] >= 60
    on_status = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == pod["containers"][0]["name"]
            on_status |= dict.fromkeys(codes["values"], rule["action"])
        else:
            assert (rule["action"], rule["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    assert on_status == {stop.STATUS: "Ignore", 2: "FailJob"}


def test_the_manifests_options_are_trains(tmp_path):
    words = documents()[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    data = tmp_path / "data.yaml"
    data.touch()
    options = [f"--data={data}" if word.startswith("--data=") else word for word in words]
    assert options != words
    run = cli_args.parse(options[options.index("dsyolo/train.py") + 1 :])
    assert run.resume == "auto"
    assert (ROOT / run.deepspeed_config).is_file()


def test_the_examples_are_what_the_launcher_reads(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {"node1": 8, "node2": 8}
    lines = (LAUNCH / "deepspeed_env.example").read_text().splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z_]+=[\w/.:-]*", line) for line in kept)
    named = {line.lstrip("#").split("=")[0] for line in lines if re.match(r"#?[A-Z_]+=", line)}
    assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DS_ACCELERATOR", "XDG_CACHE_HOME", "PATH"} <= named


# ---- real runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("launch"))


def wait_for_step(process: subprocess.Popen, place: Path, name: str) -> None:
    path, end = place / "runs" / name / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and '"step": 1,' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.soak
def test_slurm_requeues_what_was_stopped_and_goes_on(place):
    tools = place / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = environment(place)
    job = {"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_NODELIST": "[a-b]", "SLURM_JOB_ID": "77"}
    env |= {**job, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "CONFIG": str(place / "ds.json")}
    env["PATH"] = f"{tools}:{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    (place / "dsyolo").symlink_to(ROOT / "dsyolo")  # the checkout that the job was submitted from
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *arguments(place, "slurm", epochs=5)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, env=env, cwd=place, **pipes)
    wait_for_step(job, place, "slurm")
    for task in (place / "tasks").read_text().split():  # as --signal=TERM@90: to the tasks, not to the script
        os.kill(int(task), signal.SIGTERM)
    said = job.communicate(timeout=100)[0]
    assert job.returncode == stop.STATUS, said
    assert "x 2 ranks" in said
    assert (place / "scontrol_was_told").read_text().splitlines() == ["show hostnames [a-b]", "requeue 77"]
    done = len(losses(place, "slurm"))
    assert 1 <= done < 15
    again = subprocess.run(command, env=env, cwd=place, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [step for step, *_ in losses(place, "slurm")] == list(range(1, 16))
    assert "requeue" not in (place / "scontrol_was_told").read_text().splitlines()[-1]


@pytest.mark.soak
def test_ranks_pass_sigterm_on_and_end_with_its_status(place):
    command = [sys.executable, str(LAUNCH / "ranks.py"), "--ranks", "2", "--master_port", str(free_port())]
    command += [str(ROOT / "dsyolo/train.py"), *arguments(place, "ranks", epochs=5)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment(place), cwd=place, **pipes)
    wait_for_step(process, place, "ranks")
    process.terminate()
    said = process.communicate(timeout=100)[0]
    assert process.returncode == stop.STATUS, said
    assert "Preempted: saved after step" in said


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("import sys; sys.exit(0)", 0),
        ("import os, sys; sys.exit(2 if os.environ['RANK'] == '3' else 0)", 2),
        # the one that fails first tells why; another does not end by itself
        ("import os, sys, time; os.environ['RANK'] == '3' and sys.exit(5); time.sleep(99)", 5),
        ("import os, signal; os.environ['LOCAL_RANK'] == '0' and os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_ranks_end_with_the_first_failure(tmp_path, script, status):
    (tmp_path / "work.py").write_text(script)
    starter = (LAUNCH / "ranks.py").read_text().replace("GRACE_S = 60", "GRACE_S = 1")
    (tmp_path / "ranks.py").write_text(starter)
    command = [sys.executable, str(tmp_path / "ranks.py"), "--ranks", "2", "--nodes", "2", "--node", "1"]
    done = subprocess.run([*command, str(tmp_path / "work.py")], timeout=30)
    assert done.returncode == status


def test_ranks_get_their_places(tmp_path):
    # a line and its end in one write, since two ranks print at once
    (tmp_path / "work.py").write_text(
        "import json\nfrom dsyolo.base.environment import read_environment\n"
        "print(json.dumps(read_environment()[:6]) + '\\n', end='')"
    )
    words = ["--ranks", "2", "--nodes", "2", "--node", "1", "--master_addr", "first", "--master_port", "7"]
    command = [sys.executable, str(LAUNCH / "ranks.py"), *words, str(tmp_path / "work.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    places = sorted(map(json.loads, done.stdout.splitlines()))
    assert places == [[2, 4, 0, 2, "first", 7], [3, 4, 1, 2, "first", 7]]
