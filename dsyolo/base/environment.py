"""The environment variables that dsyolo reads, and those that it sets for torch and DeepSpeed.

A launcher passes each rank its position by variables: deepspeed's and torchrun's own, or Slurm's, if srun started the
ranks. Nothing else uses os.environ, except doctor/probe.py, which runs on other hosts without dsyolo.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsyolo.base.errors import UserError

_WANDB = {"wandb": "WANDB_MODE", "wandb_project": "WANDB_PROJECT", "wandb_name": "WANDB_NAME"}
_WANDB_OWN = {  # that dsyolo sets for itself, unless the user has set W&B's variable
    "dir": ("WANDB_DIR",),
    "resume": ("WANDB_RESUME",),
    "console": ("WANDB_CONSOLE",),
    "quiet": ("WANDB_QUIET", "WANDB_SILENT"),
    "init_timeout": ("WANDB_INIT_TIMEOUT",),
    "login_timeout": ("WANDB_LOGIN_TIMEOUT",),
}
_WANDB_MODES = {  # W&B's modes, and its older names for two of them
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "shared": "online",
    "run": "online",
    "dryrun": "offline",
}
MOST_PORT = 65535
RESTARTED = "--restarted"  # on a command line: what follows was appended by a restart, and replaces what stands before
MOST_DIGITS = 9  # of a number in the environment


class Environment(NamedTuple):
    """The settings that the environment gives."""

    rank: int
    size: int  # ranks, of all machines
    local_rank: int
    local_size: int  # ranks on this machine
    master_addr: str | None  # where rank 0 listens
    master_port: int | None
    accelerator: str | None  # DS_ACCELERATOR; None: DeepSpeed chooses
    cache: Path  # for files that can be made again: $XDG_CACHE_HOME, else ~/.cache
    under_torchrun: bool = False  # its agents keep the rendezvous' store, and end all ranks if one fails


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read `variables` (default: this process's); without a launcher the world has one rank.

    Raises UserError where a launcher's are incomplete.
    """
    given = os.environ if variables is None else variables
    problems: list[str] = []
    started_by_srun = "RANK" not in given and "SLURM_STEP_NUM_TASKS" in given
    place = _from_srun(given, problems) if started_by_srun else _from_launcher(given, problems)
    rank, size, *_ = place
    if not problems and rank >= size:
        problems.append(
            f"{'SLURM_PROCID' if started_by_srun else 'RANK'}: {rank} given, but with {size} ranks it must be 0 to {size - 1}. Start all through one launcher."
        )
    problems += _misplaced(place, started_by_srun) if not problems else []
    if size > 1 and not given.get("RANK") and not started_by_srun:
        rule = "no RANK beside it. Start ranks with a launcher (see launch/), or unset WORLD_SIZE for a run alone"
        problems.append(f"WORLD_SIZE: {size} given, and {rule}.")
    elif size > 1 and not given.get("MASTER_ADDR"):
        problems.append("MASTER_ADDR: missing. Set it to the name or address of the machine of rank 0.")
    port = _number(given, "MASTER_PORT", 29500, problems) if size > 1 or "MASTER_PORT" in given else None
    if port is not None and not (port <= MOST_PORT and (port or size == 1)):  # 0: any free one, for one rank
        problems.append(
            f"MASTER_PORT: {port} given, but it must be 1 to {MOST_PORT}. Give the launcher a free one by --master_port."
        )
    if problems:
        raise UserError("The environment does not give this rank its position", problems)
    cache = given.get("XDG_CACHE_HOME")
    return Environment(
        *place,
        master_addr=given.get("MASTER_ADDR") or None,
        master_port=port,
        accelerator=given.get("DS_ACCELERATOR") or None,
        cache=Path(cache) if cache else Path.home() / ".cache",
        under_torchrun=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def export_to_torch(place: Environment, *, instead: bool = False) -> None:
    """Set the variables that torch and DeepSpeed read, for child processes too. `instead` overwrites a launcher's."""
    variables = {
        "RANK": place.rank,
        "WORLD_SIZE": place.size,
        "LOCAL_RANK": place.local_rank,
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": place.master_port,
    }
    if place.accelerator:
        variables["DS_ACCELERATOR"] = place.accelerator
    for name, value in variables.items():
        if instead or name not in os.environ:
            os.environ[name] = str(value)


def wait_passively() -> None:
    """Let OpenMP's threads sleep where they wait for each other. Call it before torch is imported.

    By default they wait in a loop, and keep a core from another process that could give theirs back. Where the user has
    set any variable of it, nothing is changed.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0")  # GNU's and LLVM's; Intel's


def wandb_options(problems: list[str]) -> dict[str, str]:
    """Return the options that W&B's own variables give, by their names here; one that cannot be used is a problem.

    W&B itself reads WANDB_ENTITY and WANDB_RUN_GROUP, for which dsyolo has no option.
    """
    found = {key: os.environ.get(name) for key, name in _WANDB.items()}
    options = {key: value for key, value in found.items() if value}
    if mode := options.get("wandb"):
        options["wandb"] = _WANDB_MODES.get(mode, "")
        if not options["wandb"]:
            rule = f"{mode!r} given, but it must be {', '.join(_WANDB_MODES)}"
            problems.append(f"WANDB_MODE: {rule}. Correct the variable, or unset it.")
            del options["wandb"]
    return options


def without_wandb_variables(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `wandb.init` and its settings for which the user has set no variable of W&B's."""
    return {
        key: value
        for key, value in options.items()
        if not any(os.environ.get(name) for name in _WANDB_OWN.get(key, ()))
    }


def choose_cpu() -> None:
    """Let torch and DeepSpeed use the CPU, in child processes and after a restart too."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def all_variables() -> dict[str, str]:
    """Return a copy of this process's variables, for child processes."""
    return dict(os.environ)


def terminal_type() -> str:
    """Return TERM: `dumb` for a terminal that cannot rewrite a line; empty where it is not set."""
    return os.environ.get("TERM", "")


def restart_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode, where the locale has another encoding. The pid stays.

    Else libraries read their own files in the locale's: torch's compiler cannot be imported under zh_CN.GBK. Paths are
    bytes then, the same in every locale; the terminal gets its own encoding, with escapes for letters that it lacks.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    terminal = sys.stdout.encoding if sys.stdout else "utf-8"
    given = {"PYTHONUTF8": "1", "PYTHONIOENCODING": f"{terminal}:backslashreplace"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], {**os.environ, **given})


def count_restart() -> None:
    """Count a restart of all ranks: torchrun's store keeps the keys of each start apart by this number."""
    count = _number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0, [])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count + 1)


def _from_launcher(given: Mapping[str, str], problems: list[str]) -> tuple[int, int, int, int]:
    if "RANK" in given and "WORLD_SIZE" not in given:
        problems.append("WORLD_SIZE: missing beside RANK. Start ranks with a launcher: see launch/.")
    size = _number(given, "WORLD_SIZE", 1, problems, least=1)
    # torchrun's name, and deepspeed's
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in given else "LOCAL_SIZE"
    rank, local_rank = (_number(given, name, 0, problems) for name in ("RANK", "LOCAL_RANK"))
    return rank, size, local_rank, _number(given, local_size, size, problems, least=1)


def _from_srun(given: Mapping[str, str], problems: list[str]) -> tuple[int, int, int, int]:
    size = _number(given, "SLURM_STEP_NUM_TASKS", 1, problems, least=1)
    per_node = given.get("SLURM_STEP_TASKS_PER_NODE", "")
    number = r"[0-9]{1,6}"  # more are no machines, and would be a list that fills the memory
    if not re.fullmatch(rf"{number}(\(x{number}\))?(,{number}(\(x{number}\))?)*", per_node):
        shown = repr(per_node[:40]) + " ..." * (len(per_node) > 40)
        problems.append(
            f"SLURM_STEP_TASKS_PER_NODE: {shown} given, but it must look like 8(x2),4. Start ranks with srun."
        )
        per_node = "1"
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
        for _ in range(int(times or 1))
    ]
    names = ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID")
    node, rank, local_rank = (_number(given, name, 0, problems) for name in names)
    return rank, size, local_rank, counts[min(node, len(counts) - 1)]


def _misplaced(place: tuple[int, int, int, int], started_by_srun: bool) -> list[str]:
    """Return what is wrong with a rank's place on its machine: two ranks would take one GPU, or one that is not there."""
    _, size, local_rank, local_size = place
    name = "SLURM_LOCALID" if started_by_srun else "LOCAL_RANK"
    if not 1 <= local_size <= size:
        rule = f"but with {size} ranks in all it must be 1 to {size}"
        return [f"LOCAL_SIZE: {local_size} given, {rule}. Start all through one launcher."]
    if local_rank >= local_size:
        rule = f"but with {local_size} ranks on this machine it must be 0 to {local_size - 1}"
        return [f"{name}: {local_rank} given, {rule}. Start all through one launcher."]
    return []


def _number(given: Mapping[str, str], name: str, default: int, problems: list[str], least: int = 0) -> int:
    text = given.get(name, str(default))
    if text.isdecimal() and len(text) <= MOST_DIGITS and int(text) >= least:
        return int(text)
    shown = repr(text[:40]) + " ..." * (len(text) > 40)
    problems.append(f"{name}: {shown} given, but it must be a whole number, at least {least}.")
    return default
