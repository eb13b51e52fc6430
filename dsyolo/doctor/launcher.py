"""Check the two ways in which the deepspeed launcher reaches hosts: pdsh, and plain ssh to the first one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dsyolo.base.environment import all_variables
from dsyolo.doctor.context import DoctorOptions
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding
from dsyolo.doctor.hosts import Host
from dsyolo.doctor.interconnect import is_address


def check_launcher(options: DoctorOptions, hosts: Sequence[Host]) -> tuple[list[Finding], str | None]:
    """Return findings on both ways, and the address of the ranks' rendezvous."""
    first = hosts[0].name
    with ThreadPoolExecutor(2) as pool:
        pdsh = pool.submit(_pdsh, options, hosts) if len(hosts) > 1 else None
        address = _address_by_plain_ssh(first, options.timeout_s)
        findings = [pdsh.result()] if pdsh else []
    master = options.master_addr or address
    if address:
        finding = Finding("launcher", "", OK, f"{first} gives its address over plain ssh: {address}")
    else:
        text = f"cannot get the address of {first} by plain ssh, without PDSH_SSH_ARGS_APPEND"
        flags = "--no_ssh_check" if master else "--no_ssh_check --master_addr ADDRESS, and --master_addr here"
        remedy = f"Put the ssh options into ~/.ssh/config, or give the launcher {flags}."
        finding = Finding("launcher", "", WARNING if master else FAIL, text, remedy)
    return [*findings, finding], master


def _address_by_plain_ssh(host: str, limit_s: float) -> str | None:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(limit_s))}"]
    addresses = _stdout(["ssh", *options, "--", host, "hostname -I"], limit_s).split()
    return addresses[0] if addresses and is_address(addresses[0]) else None


def _pdsh(options: DoctorOptions, hosts: Sequence[Host]) -> Finding:
    if shutil.which("pdsh") is None:
        return Finding("launcher", "", FAIL, "pdsh is not installed", "Install the package pdsh here.")
    names = ",".join(host.name for host in hosts)
    seconds = str(max(1, round(options.timeout_s)))
    limits = ["-t", seconds, "-u", seconds]
    command = [
        "pdsh",
        "-N",
        "-S",
        *limits,
        "-w",
        names,
        "echo",
        "here",
        "%h",
    ]  # %h: the host, filled in by pdsh
    lines = _stdout(command, options.timeout_s + 5, {"PDSH_RCMD_TYPE": "ssh"}).splitlines()
    reached = {line.removeprefix("here ").strip() for line in lines if line.startswith("here ")}
    lost = [host.name for host in hosts if host.name.rpartition("@")[2] not in reached]
    if lost:
        text = f"pdsh does not reach {', '.join(lost)}"
        return Finding("launcher", "", FAIL, text, f"See: PDSH_RCMD_TYPE=ssh pdsh -S -w {names} true")
    return Finding("launcher", "", OK, "pdsh reaches all hosts")


def _stdout(command: Sequence[str], limit_s: float, variables: Mapping[str, str] | None = None) -> str:
    try:
        return subprocess.run(
            command,
            env={**all_variables(), **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            start_new_session=True,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
