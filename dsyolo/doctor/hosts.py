"""What the deepspeed launcher reads before it goes to other hosts: the hostfile, and the environment that crosses.

Source: DeepSpeed 0.19.8, launcher/runner.py and launcher/multinode_runner.py. The launcher dies of a bad line with a
traceback, or takes something else than was meant; here each is a finding. `tests/doctor/test_doctor.py` compares both.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dsyolo.base.environment import all_variables
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\S*)")
# ssh takes a word that starts with a dash for an option, and pdsh brackets and commas for several hosts.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
# A variable of these prefixes goes to all hosts; the last one where there are NVIDIA GPUs.
CARRIED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


class Host(NamedTuple):
    """A line of the hostfile, or this machine."""

    name: str
    slots: int  # ranks


def read_hostfile(path: Path) -> tuple[list[Host], list[Finding]]:
    """The hosts that can be used, and what is wrong with the others."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        rule = "the launcher would train on this machine alone, with a warning. Check --hostfile."
        return [], [Finding("hostfile", "", FAIL, f"{path} does not exist", rule)]
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not a text file"
        return [], [
            Finding(
                "hostfile", "", FAIL, f"{path} cannot be read: {what}", "Check --hostfile and its rights."
            )
        ]
    hosts: dict[str, Host] = {}
    findings: list[Finding] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        host, fault, remedy = _read_line(line, hosts)
        if fault:
            findings.append(Finding("hostfile", "", FAIL, f"line {number}: {fault}", remedy))
        elif host:
            hosts[host.name] = host
    if not hosts and not findings:
        findings.append(
            Finding("hostfile", "", FAIL, f"{path} names no host", "Add lines like: node1 slots=8")
        )
    if not findings:
        ranks = sum(host.slots for host in hosts.values())
        listed = ", ".join(f"{host.name} {host.slots}" for host in hosts.values())
        findings.append(Finding("hostfile", "", OK, f"{len(hosts)} hosts, {ranks} ranks: {listed}"))
    return list(hosts.values()), findings


def _read_line(line: str, known: Mapping[str, Host]) -> tuple[Host | None, str, str]:
    """(host, fault, remedy)."""
    match = _LINE.match(line)
    if not match:
        return None, f"{line!r}, but a host and its ranks belong there", "Write it like: node1 slots=8"
    name, slots, rest = match.groups()
    if rest:
        return None, f"slots={slots}{rest}, which the launcher takes for {slots}", "Write a whole number."
    if not _HOST.fullmatch(name):
        remedy = "Give each host a line of its own, by its name or address."
        return None, f"{name!r} is not the name of one host", remedy
    if name in known:
        return None, f"{name} is there twice", "Leave one out, and give the other all slots."
    if int(slots) == 0:
        return None, f"{name} has slots=0, and would run no rank", "Leave the line out, or give it slots."
    return Host(name, int(slots)), "", ""


class Crossing(NamedTuple):
    """The environment that ranks get on other hosts, beside what a login there has."""

    variables: Mapping[str, str]
    findings: Sequence[Finding]


def read_crossing() -> Crossing:
    """As the launcher collects it: PYTHONPATH with this folder first, variables by prefix, .deepspeed_env."""
    own = all_variables()
    variables = {key: value for key, value in own.items() if key.startswith(CARRIED)}
    paths = [os.path.abspath("."), *filter(None, [own.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    name = own.get("DS_ENV_FILE", ".deepspeed_env")
    findings: list[Finding] = []
    files = dict.fromkeys(Path(os.path.abspath(Path(folder, name))) for folder in (Path.home(), "."))
    for file in filter(Path.is_file, files):
        given: dict[str, str] = {}
        faults = _read_env_file(file, given)
        variables |= given
        findings += [Finding("environment", "", FAIL, f"{file}, {fault}", remedy) for fault, remedy in faults]
        if not faults:
            findings.append(Finding("environment", "", OK, f"{file} carries {', '.join(given) or 'nothing'}"))
    if not findings:
        rule = f"no {name} here or at home: only variables that start with {', '.join(CARRIED)} cross"
        is_wanted = "DS_ENV_FILE" in own
        remedy = "DS_ENV_FILE names it: correct that, or make the file." if is_wanted else ""
        findings.append(Finding("environment", "", WARNING if is_wanted else OK, rule, remedy))
    return Crossing(variables, findings)


def _read_env_file(file: Path, variables: dict[str, str]) -> list[tuple[str, str]]:
    """(fault, remedy) of each line that the launcher cannot take."""
    faults = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [("which cannot be read", "Make it a text file that you may read.")]
    for number, line in enumerate(lines, 1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            what = f"line {number}: {line!r} without a =, and the launcher dies of it"
            faults.append((what, "Leave out blank lines and comments: write NAME=value."))
        elif not re.fullmatch(r"[A-Za-z_]\w*", key):
            what = f"line {number}: {key!r} is no name of a variable, and spoils the command on the hosts"
            faults.append((what, "Write NAME=value."))
        else:
            variables[key] = value
    return faults


def remote_command(executable: str, crossing: Crossing, words: Sequence[str]) -> str:
    """The line that a host's shell gets: the launcher's, with `words` for Python in the place of its own module."""
    exports = "".join(f"export {key}={_quoted(value)}; " for key, value in crossing.variables.items())
    folder, python = shlex.quote(os.path.abspath(".")), shlex.quote(executable)
    checks = f"cd {folder} 2>/dev/null || exit {NO_FOLDER}; [ -x {python} ] || exit {NO_PYTHON}; "
    return f"{exports}{checks}exec {python} {shlex.join(words)}"


def _quoted(value: str) -> str:
    """As the launcher does it: what stands after a $ is the host's own."""
    return f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value


NO_FOLDER, NO_PYTHON = 97, 96  # statuses that neither ssh nor Python ends with


def ssh_command(host: str, timeout_s: float) -> list[str]:
    """ssh as pdsh calls it, without a question to anybody."""
    own = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(timeout_s))}", "-a", "-x"]
    return ["ssh", *shlex.split(all_variables().get("PDSH_SSH_ARGS_APPEND", "")), *own, "--", host]


def shown_env(crossing: Crossing, name: str) -> str:
    """A hint for a variable that is set here and does not reach the other hosts; empty where it does."""
    here = all_variables().get(name)
    if here is None or name in crossing.variables:
        return ""
    return f"It is {here} here, but does not cross: write {name}={here} into .deepspeed_env."
