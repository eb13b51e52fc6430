"""Check the two ways in which the deepspeed launcher reaches hosts: pdsh, and plain ssh to the first one."""

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsyolo.base.environment import all_variables
from dsyolo.doctor.context import DoctorOptions
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding
from dsyolo.doctor.hosts import Host, ssh_options
from dsyolo.doctor.interconnect import is_address


def check_launcher(options: DoctorOptions, hosts: Sequence[Host]) -> tuple[list[Finding], str | None]:
    """Return findings on both ways, and the address of the ranks' rendezvous."""
    first = hosts[0].name
    with ThreadPoolExecutor(1) as pool:
        pdsh = (
            pool.submit(_pdsh, [host.name for host in hosts], options.timeout_s) if len(hosts) > 1 else None
        )
        command = ["ssh", *ssh_options(options.timeout_s), "--", first, "hostname -I"]
        addresses = _stdout(command, options.timeout_s).split()
        findings = [pdsh.result()] if pdsh else []
    address = addresses[0] if addresses and is_address(addresses[0]) else None
    master = options.master_addr or address
    if address:
        finding = Finding("launcher", "", OK, f"{first} gives its address over plain ssh: {address}")
    else:
        text = f"cannot get the address of {first} by plain ssh, without PDSH_SSH_ARGS_APPEND"
        flags = "--no_ssh_check" if master else "--no_ssh_check --master_addr ADDRESS, and --master_addr here"
        remedy = f"Put the ssh options into ~/.ssh/config, or give the launcher {flags}."
        finding = Finding("launcher", "", WARNING if master else FAIL, text, remedy)
    return [*findings, finding], master


def _pdsh(names: Sequence[str], timeout_s: float) -> Finding:
    if shutil.which("pdsh") is None:
        return Finding("launcher", "", FAIL, "pdsh is not installed", "Install the package pdsh here.")
    seconds, listed = str(max(1, round(timeout_s))), ",".join(names)
    command = ["pdsh", "-N", "-S", "-t", seconds, "-u", seconds, "-w", listed, "echo", "here", "%h"]
    lines = _stdout(command, timeout_s + 5).splitlines()  # pdsh puts each host's name for %h
    reached = {line.removeprefix("here ").strip() for line in lines if line.startswith("here ")}
    lost = [name for name in names if name.rpartition("@")[2] not in reached]
    if lost:
        text = f"pdsh does not reach {', '.join(lost)}"
        return Finding("launcher", "", FAIL, text, f"See: PDSH_RCMD_TYPE=ssh pdsh -S -w {listed} true")
    return Finding("launcher", "", OK, "pdsh reaches all hosts")


def _stdout(command: Sequence[str], limit_s: float) -> str:
    env = {**all_variables(), "PDSH_RCMD_TYPE": "ssh"}
    options: dict[str, Any] = {"env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
    options |= {"capture_output": True, "text": True, "errors": "replace"}
    try:
        return subprocess.run(command, timeout=limit_s, **options).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
