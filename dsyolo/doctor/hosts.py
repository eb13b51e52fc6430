"""Read what the deepspeed launcher reads: the hostfile, and the environment that it forwards to other hosts.

Source: DeepSpeed 0.19.8, launcher/runner.py and launcher/multinode_runner.py. A bad line ends
the launcher with a traceback or is misread; here it is a finding. `tests/doctor/test_doctor.py` compares both.
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
# ssh takes a leading dash for an option, and pdsh takes brackets and commas for several hosts.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
# Variables with these prefixes are forwarded; NCCL only where there are NVIDIA GPUs.
FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


class Host(NamedTuple):
    """A line of the hostfile, or this machine."""

    name: str
    slots: int  # ranks


def read_hostfile(path: Path) -> tuple[list[Host], list[Finding]]:
    """Return the usable hosts, and findings about the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        remedy = "Check --hostfile: without it the launcher trains on this machine alone."
        return [], [Finding("hostfile", "", FAIL, f"{path} does not exist", remedy)]
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not a text file"
        remedy = "Check --hostfile and its permissions."
        return [], [Finding("hostfile", "", FAIL, f"{path} cannot be read: {what}", remedy)]
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
        remedy = "Add lines like: node1 slots=8"
        findings.append(Finding("hostfile", "", FAIL, f"{path} names no host", remedy))
    if not findings:
        ranks = sum(host.slots for host in hosts.values())
        listed = ", ".join(f"{host.name} {host.slots}" for host in hosts.values())
        findings.append(Finding("hostfile", "", OK, f"{len(hosts)} hosts, {ranks} ranks: {listed}"))
    return list(hosts.values()), findings


def _read_line(line: str, known: Mapping[str, Host]) -> tuple[Host | None, str, str]:
    """Return (host, fault, remedy)."""
    match = _LINE.match(line)
    if not match:
        return None, f"{line!r} is not a host and its slots", "Write it like: node1 slots=8"
    name, slots, rest = match.groups()
    if rest:
        return None, f"slots={slots}{rest}, which the launcher reads as {slots}", "Write a whole number."
    if not _HOST.fullmatch(name):
        remedy = "Give each host its own line, with its name or address."
        return None, f"{name!r} is not the name of one host", remedy
    if name in known:
        return None, f"{name} is listed twice", "Remove one, and give the other all slots."
    if int(slots) == 0:
        return None, f"{name} has slots=0 and would run no rank", "Remove the line, or give it slots."
    return Host(name, int(slots)), "", ""


class ForwardedEnvironment(NamedTuple):
    """The variables that ranks on other hosts get in addition to a login's there."""

    variables: Mapping[str, str]
    findings: Sequence[Finding]


def read_forwarded() -> ForwardedEnvironment:
    """Return what the launcher forwards: PYTHONPATH with this folder first, variables by prefix, .deepspeed_env."""
    own = all_variables()
    variables = {key: value for key, value in own.items() if key.startswith(FORWARDED_PREFIXES)}
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
            findings.append(
                Finding("environment", "", OK, f"{file} forwards {', '.join(given) or 'nothing'}")
            )
    if not findings:
        prefixes = ", ".join(FORWARDED_PREFIXES)
        text = (
            f"no {name} here or in the home folder: only variables that start with {prefixes} are forwarded"
        )
        is_wanted = "DS_ENV_FILE" in own
        remedy = "Correct DS_ENV_FILE, or create the file." if is_wanted else ""
        findings.append(Finding("environment", "", WARNING if is_wanted else OK, text, remedy))
    return ForwardedEnvironment(variables, findings)


def _read_env_file(file: Path, variables: dict[str, str]) -> list[tuple[str, str]]:
    """Add a file's variables; return (fault, remedy) of each line that the launcher cannot read."""
    faults = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [("which cannot be read", "Make it a text file that you can read.")]
    for number, line in enumerate(lines, 1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            what = f"line {number}: {line!r} has no =, which ends the launcher"
            faults.append((what, "Remove blank lines and comments: write NAME=value."))
        elif not re.fullmatch(r"[A-Za-z_]\w*", key):
            what = f"line {number}: {key!r} is not a variable's name, which breaks the command on the hosts"
            faults.append((what, "Write NAME=value."))
        else:
            variables[key] = value
    return faults


def remote_command(executable: str, forwarded: ForwardedEnvironment, arguments: Sequence[str]) -> str:
    """Return the line for a host's shell: the launcher's own, but with other arguments for Python."""
    exports = "".join(f"export {key}={_quoted(value)}; " for key, value in forwarded.variables.items())
    folder, python = shlex.quote(os.path.abspath(".")), shlex.quote(executable)
    checks = f"cd {folder} 2>/dev/null || exit {NO_FOLDER}; [ -x {python} ] || exit {NO_PYTHON}; "
    return f"{exports}{checks}exec {python} {shlex.join(arguments)}"


def _quoted(value: str) -> str:
    """Quote as the launcher does, so that the host expands $NAME."""
    return f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value


NO_FOLDER, NO_PYTHON = 97, 96  # exit statuses that neither ssh nor Python uses


def ssh_command(host: str, timeout_s: float) -> list[str]:
    """Return ssh as pdsh calls it, without prompts."""
    own = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(timeout_s))}", "-a", "-x"]
    return ["ssh", *shlex.split(all_variables().get("PDSH_SSH_ARGS_APPEND", "")), *own, "--", host]


def forwarding_hint(forwarded: ForwardedEnvironment, name: str) -> str:
    """Return a hint if a variable is set here but not forwarded; empty if it is."""
    here = all_variables().get(name)
    if here is None or name in forwarded.variables:
        return ""
    return f"It is {here} here, but not forwarded: write {name}={here} into .deepspeed_env."
