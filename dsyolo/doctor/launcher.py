"""Tries the two ways that the deepspeed launcher has to its hosts: pdsh, and a plain ssh to the first one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from dsyolo.doctor.case import Options
from dsyolo.doctor.hosts import Host
from dsyolo.doctor.network import is_address
from dsyolo.doctor.report import FAIL, OK, WARNING, Finding


def try_launcher(options: Options, hosts: Sequence[Host]) -> tuple[list[Finding], str | None]:
    """The two ways of the launcher to its hosts, tried; and the address that ranks will meet at."""
    findings = [_pdsh(options, hosts)] if len(hosts) > 1 else []
    first, limit_s = hosts[0].name, options.timeout_s
    told = _plain_ssh(first, limit_s)
    if told:
        master = options.master_addr or told
        return [
            *findings,
            Finding("launcher", "", OK, f"ranks meet at {master}, port {options.master_port}"),
        ], master
    text = f"asks {first} its address by plain ssh, without PDSH_SSH_ARGS_APPEND, which fails"
    if options.master_addr:
        remedy = "Give it --no_ssh_check too, or write what ssh needs into ~/.ssh/config."
        return [*findings, Finding("launcher", "", WARNING, text, remedy)], options.master_addr
    remedy = "Write what ssh needs into ~/.ssh/config; or give it --no_ssh_check --master_addr, and --master_addr here."
    return [*findings, Finding("launcher", "", FAIL, text, remedy)], None


def _plain_ssh(host: str, limit_s: float) -> str | None:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(limit_s))}"]
    said = _said(["ssh", *options, "--", host, "hostname -I"], limit_s)
    words = (said or "").split()
    return words[0] if words and is_address(words[0]) else None


def _pdsh(options: Options, hosts: Sequence[Host]) -> Finding:
    if shutil.which("pdsh") is None:
        return Finding("launcher", "", FAIL, "pdsh is not installed", "Install the package pdsh here.")
    names = ",".join(host.name for host in hosts)
    seconds = str(max(1, round(options.timeout_s)))
    command = ["pdsh", "-S", "-t", seconds, "-u", seconds, "-w", names, "echo", "here"]
    said = _said(command, options.timeout_s + 5, {"PDSH_RCMD_TYPE": "ssh"}) or ""
    reached = {line.partition(":")[0] for line in said.splitlines() if line.endswith("here")}
    lost = [host.name for host in hosts if host.name.rpartition("@")[2] not in reached]
    if lost:
        text = f"pdsh does not get to {', '.join(lost)}"
        return Finding("launcher", "", FAIL, text, f"See: PDSH_RCMD_TYPE=ssh pdsh -S -w {names} true")
    return Finding("launcher", "", OK, "pdsh gets to all hosts")


def _said(command: Sequence[str], limit_s: float, variables: Mapping[str, str] | None = None) -> str | None:
    try:
        return subprocess.run(
            command,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            start_new_session=True,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
