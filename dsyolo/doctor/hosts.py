"""Read what the deepspeed launcher reads: the hostfile, and the environment that it forwards to other hosts.

Source: DeepSpeed 0.19.8, launcher/runner.py and launcher/multinode_runner.py. A bad line ends
the launcher with a traceback or is misread; here it is a finding. `tests/doctor/test_doctor.py` compares both.
"""

import codecs
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dsyolo.base.environment import all_variables
from dsyolo.base.safe_io import read_bytes
from dsyolo.base.text import decode
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding, split_problem

LOCAL = "this machine"  # the name of a host that needs no ssh
NO_FOLDER, NO_PYTHON = 97, 96  # exit statuses that neither ssh nor Python uses
# Variables with these prefixes are forwarded; NCCL only where there are NVIDIA GPUs.
FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MOST_DIGITS = 6  # of a number of slots
_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\S*)")
# ssh takes a leading dash for an option, and pdsh takes brackets and commas for several hosts.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")


class Host(NamedTuple):
    """A line of the hostfile, or this machine."""

    name: str
    slots: int  # ranks


def read_hostfile(path: Path) -> tuple[list[Host], list[Finding]]:
    """Return the usable hosts, and findings about the file."""
    failed = partial(Finding, "hostfile", "", FAIL)
    try:
        raw = read_bytes(path)
        lines = decode(raw, path).splitlines()
    except FileNotFoundError:
        remedy = "Check --hostfile: without it the launcher trains on this machine alone."
        return [], [failed(f"{path} does not exist", remedy)]
    except OSError as error:
        fault, remedy = split_problem(error.strerror or "", "Check --hostfile and its permissions.")
        return [], [failed(f"{path} cannot be read: {fault}", remedy)]
    hosts: dict[str, int] = {}
    findings: list[Finding] = []
    if raw.startswith(MARKS):
        fault = f"{path} begins with a byte-order mark, which the launcher reads as a part of the first host's name"
        findings.append(
            failed(fault, "Save it as UTF-8 without one: an editor calls it 'UTF-8', not 'UTF-8 with BOM'.")
        )
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#") and (problem := _read_line(line, hosts)):
            fault, remedy = problem
            findings.append(failed(f"line {number}: {fault}", remedy))
    if not hosts and not findings:
        findings.append(failed(f"{path} names no host", "Add lines like: node1 slots=8"))
    if not findings:
        listed = ", ".join(f"{name} {slots}" for name, slots in hosts.items())
        text = f"{len(hosts)} hosts, {sum(hosts.values())} ranks: {listed}"
        findings.append(Finding("hostfile", "", OK, text))
    return [Host(*item) for item in hosts.items()], findings


def _read_line(line: str, hosts: dict[str, int]) -> tuple[str, str] | None:
    """Add the line's host; return (fault, remedy) of a line that cannot be used."""
    match = _LINE.match(line)
    if not match:
        return f"{line!r} is not a host and its slots", "Write it like: node1 slots=8"
    name, slots, rest = match.groups()
    if rest:
        return f"slots={slots}{rest}, which the launcher reads as {slots}", "Write a whole number."
    if port := re.fullmatch(r"([A-Za-z0-9_.@-]+):(\d+)", name):
        fault = f"{name!r} has a port, which the launcher takes for a part of the name"
        own = "or give this host its own Port in ~/.ssh/config"
        return fault, f"Write {port[1]} here, and start with `deepspeed --ssh_port {port[2]}`, {own}."
    if not _HOST.fullmatch(name):
        remedy = "Give each host its own line, with its name or address."
        return f"{name!r} is not the name of one host", remedy
    if name in hosts:
        return f"{name} is listed twice", "Remove one, and give the other all slots."
    if len(slots) > MOST_DIGITS:
        return f"{name} has {slots[:MOST_DIGITS]}... slots", "Write how many ranks it is to run."
    if int(slots) == 0:
        return f"{name} has slots=0 and would run no rank", "Remove the line, or give it slots."
    hosts[name] = int(slots)
    return None


class ForwardedEnvironment(NamedTuple):
    """The variables that ranks on other hosts get in addition to a login's there."""

    variables: Mapping[str, str]
    findings: Sequence[Finding]

    def hint(self, name: str) -> str:
        """Return a hint if a variable is set here but not forwarded; empty if it is."""
        here = all_variables().get(name)
        if here is None or name in self.variables:
            return ""
        return f"It is {here} here, but not forwarded: write {name}={here} into .deepspeed_env."


def read_forwarded() -> ForwardedEnvironment:
    """Return what the launcher forwards: PYTHONPATH with this folder first, variables by prefix, .deepspeed_env."""
    own = all_variables()
    variables = {key: value for key, value in own.items() if key.startswith(FORWARDED_PREFIXES)}
    variables["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [own.get("PYTHONPATH")])])
    name = own.get("DS_ENV_FILE", ".deepspeed_env")
    findings: list[Finding] = []
    files = dict.fromkeys(Path(os.path.abspath(Path(folder, name))) for folder in (Path.home(), "."))
    for file in filter(Path.is_file, files):
        given: dict[str, str] = {}
        faults = _read_env_file(file, given)
        variables |= given
        findings += [Finding("environment", "", FAIL, f"{file}, {fault}", remedy) for fault, remedy in faults]
        if not faults:
            text = f"{file} forwards {', '.join(given) or 'nothing'}"
            findings.append(Finding("environment", "", OK, text))
    if not findings:
        only = f"only variables that start with {', '.join(FORWARDED_PREFIXES)} are forwarded"
        text = f"no {name} here or in the home folder: {only}"
        remedy = "Correct DS_ENV_FILE, or create the file." if "DS_ENV_FILE" in own else ""
        findings.append(Finding("environment", "", WARNING if remedy else OK, text, remedy))
    return ForwardedEnvironment(variables, findings)


def _read_env_file(file: Path, variables: dict[str, str]) -> list[tuple[str, str]]:
    """Add a file's variables; return (fault, remedy) of each line that the launcher cannot read."""
    try:
        raw = read_bytes(file)
        lines = decode(raw, file).splitlines()
    except OSError:
        return [("which cannot be read", "Make it a text file that you can read.")]
    faults = []
    if raw.startswith(MARKS):
        fault = "which begins with a byte-order mark, so that the first variable has another name"
        faults.append((fault, "Save it as UTF-8 without one."))
    for number, line in enumerate(lines, 1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            remedy = "Remove blank lines and comments: write NAME=value."
            faults.append((f"line {number}: {line!r} has no =, which ends the launcher", remedy))
        elif not re.fullmatch(r"[A-Za-z_]\w*", key):
            rule = "is not a variable's name, which breaks the command on the hosts"
            faults.append((f"line {number}: {key!r} {rule}", "Write NAME=value."))
        else:
            variables[key] = value
            if '"' in value or value[:1] == "'":
                rule = "has quotes in its value, and the launcher puts its own around them"
                plain = value.replace('"', "").removeprefix("'").removesuffix("'")
                faults.append((f"line {number}: {key} {rule}", f"Write {key}={plain}"))
    return faults


def remote_command(executable: str, forwarded: ForwardedEnvironment, arguments: Sequence[str]) -> str:
    """Return the line for a host's shell: the launcher's own, but with other arguments for Python."""
    exports = "".join(f"export {key}={_quoted(value)}; " for key, value in forwarded.variables.items())
    folder, python = shlex.quote(os.getcwd()), shlex.quote(executable)
    checks = f"cd {folder} 2>/dev/null || exit {NO_FOLDER}; [ -x {python} ] || exit {NO_PYTHON}; "
    return f"{exports}{checks}exec {python} {shlex.join(arguments)}"


def _quoted(value: str) -> str:
    """Quote as the launcher does, so that the host expands $NAME."""
    return f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value


def ssh_options(timeout_s: float) -> list[str]:
    """Return options of ssh that forbid prompts and bound the time to connect."""
    return ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(timeout_s))}"]


def ssh_command(host: str, timeout_s: float) -> list[str]:
    """Return ssh as pdsh calls it, without prompts."""
    given = shlex.split(all_variables().get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *given, *ssh_options(timeout_s), "-a", "-x", "--", host]
