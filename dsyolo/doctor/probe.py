"""Examine one host and print a JSON object per section, one per line.

`dsyolo doctor` sends this file over ssh to the host's Python, so it needs nothing but the standard library there. An
error ends only the section in which it occurs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import pwd
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIFETIME_S = 300  # then the probe ends by itself, as the connection may be lost
QUIET_S = 1800  # an invisible build that wrote nothing for so long is taken for dead; one file takes minutes
INITIAL_PID_NAMESPACE = f"pid:[{0xEFFFFFFC}]"  # the kernel's constant
# File systems that other hosts can share.
SHARED_FS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "virtiofs")
Section = dict[str, Any]


def main(request: Section) -> None:
    """Print a line for "hello" and one for each section of the request."""
    signal.alarm(LIFETIME_S)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what imported packages print goes to stderr
    sections = {"hello": _hello, **{name: SECTIONS[name] for name in request["sections"]}}
    for name, section in sections.items():
        try:
            content = section(request)
        except Exception as error:  # whatever it is, the next section may still work
            content = {"error": f"{type(error).__name__}: {error}"[:2000]}
        out.write(json.dumps({"section": name, **content}) + "\n")
        out.flush()


def _hello(request: Section) -> Section:
    return {"time": time.time(), **identity()}


def identity() -> Section:
    """Return the machine and its network namespace: two names with the same of both are one host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return {"machine": boot_id, "network": _link("/proc/self/ns/net")}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# ---- software


def _python(request: Section) -> Section:
    return {
        "executable": sys.executable,
        "version": platform.python_version(),
        "gloo_ifname": os.environ.get("GLOO_SOCKET_IFNAME"),
    }


def _packages(request: Section) -> Section:
    """Return versions and paths of packages; import those with a module's name, as an installed one may fail."""
    return {"packages": {name: _package(name, module) for name, module in request["packages"].items()}}


def _package(name: str, module: str | None) -> Section:
    try:
        if module is None:
            return {"version": importlib.metadata.version(name)}
        loaded = importlib.import_module(module)
        return {"version": str(loaded.__version__), "path": os.path.dirname(loaded.__file__ or "")}
    except importlib.metadata.PackageNotFoundError:
        return {"error": "not installed"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _sources(request: Section) -> Section:
    """Return a hash of each file of dsyolo that a run reads."""
    module = importlib.import_module("dsyolo")
    top = Path(module.__file__ or "").parent
    files = sorted(path for path in top.rglob("*") if path.suffix in (".py", ".yaml") and path.is_file())
    return {"folder": str(top), "files": {str(path.relative_to(top)): _digest(path)[:16] for path in files}}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _devices(request: Section) -> Section:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    accelerator, gpus = os.environ.get("DS_ACCELERATOR", ""), []
    with contextlib.suppress(ImportError):  # the section `packages` reports it
        cuda = importlib.import_module("torch").cuda
        gpus = [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    compilers = {"compiler": shutil.which(os.environ.get("CXX", "c++")), "ninja": shutil.which("ninja")}
    accelerator = accelerator or ("cuda" if gpus else "cpu")
    return {"cores": cores, "gpus": gpus, "accelerator": accelerator, **compilers}


def _deepspeed_json(request: Section) -> Section:
    """Check the JSON with this host's dsyolo, since folders that it names must exist here."""
    path = Path(request["deepspeed_config"])
    check = importlib.import_module("dsyolo.config.deepspeed.config").check
    source = importlib.import_module("dsyolo.config.deepspeed.json_reader").read_source(path)
    options = {"world_size": request["world_size"], "layers": request["layers"]}
    _, problems = _problems(lambda: check(source, accelerator=_devices(request)["accelerator"], **options))
    return {"digest": _digest(path) if path.is_file() else None, "problems": problems}


def _data(request: Section) -> Section:
    """Return the data set's fingerprint by this host's dsyolo: data/fingerprint.py."""
    of_data = importlib.import_module("dsyolo.data.fingerprint").of_data
    found, problems = _problems(lambda: of_data(request["data"], request.get("buckets")))
    return {"problems": problems, **(found or {})}


def _problems(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return (the result of a call, the problems that it raises)."""
    try:
        return call(), []
    except importlib.import_module("dsyolo.base.errors").UserError as error:
        return None, list(error.problems) or [error.headline]


# ---- the machine


def _disk(request: Section) -> Section:
    folders = {"runs": request["project"], "cache": os.path.join(_cache_home(), "dsyolo"), "shm": "/dev/shm"}
    return {"folders": {name: _disk_space(os.path.abspath(path)) for name, path in folders.items()}}


def _cache_home() -> str:
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def _disk_space(path: str) -> Section:
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions alone do not show it
            fault = None
    except OSError as error:
        fault = f"{existing}: {error.strerror}"
    free = shutil.disk_usage(existing if os.path.exists(existing) else os.path.dirname(existing)).free
    return {"path": path, "free": free, "fault": fault}


def _locks(request: Section) -> Section:
    """Return build locks of compiled ops: whoever finds one waits silently until it is gone."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(_cache_home(), "torch_extensions")
    found = []
    for top, folders, files in os.walk(root):
        if os.path.relpath(top, root).count(os.sep) >= 3:
            folders.clear()
        if "lock" in files:
            found.append(_lock(Path(top, "lock"), request["fix"]))
    return {"root": root, "locks": found[:100]}


def _lock(lock: Path, fix: bool) -> Section:
    status = lock.stat()
    holder = _holder(status)
    state = f"held by {holder}" if holder else _may_be_held(lock, status) or "stale"
    if state == "stale" and fix:
        state = _remove(lock, status)
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = f"user {status.st_uid}"
    return {"path": str(lock), "age_s": time.time() - status.st_mtime, "owner": owner, "state": state}


def _holder(status: os.stat_result) -> str | None:
    """Return the process that has the lock open, as torch's builds have until they are done."""
    return _process_with(lambda descriptor: os.path.samestat(os.stat(descriptor), status))


def _process_with(matches: Callable[[str], bool]) -> str | None:
    """Return the process that has a matching descriptor open, a path as /proc/1/fd/0."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if any(matches(f"/proc/{name}/fd/{number}") for number in os.listdir(f"/proc/{name}/fd")):
                return f"process {name} ({Path('/proc', name, 'comm').read_text().strip()})"
        except OSError:
            continue  # it has ended, or belongs to another user
    return None


def _may_be_held(lock: Path, status: os.stat_result) -> str | None:
    """Return why an invisible process may be building; None if that is ruled out."""
    if os.geteuid() not in (0, status.st_uid):
        return "perhaps held: only its owner can see by whom"
    kind, sees_all = _file_system(lock), _sees_all_processes()
    is_private = kind == "overlay" and status.st_dev == os.stat("/").st_dev  # a container's own root
    apart = kind in SHARED_FS or kind.startswith("fuse") or not (sees_all or is_private)
    written = max((path.lstat().st_mtime for path in lock.parent.iterdir()), default=status.st_mtime)
    if apart and time.time() - written < QUIET_S:
        return f"perhaps held: another host or container wrote here in the last {QUIET_S // 60} min"
    return None


def _sees_all_processes() -> bool:
    return _link("/proc/self/ns/pid") == INITIAL_PID_NAMESPACE


def _remove(lock: Path, status: os.stat_result) -> str:
    """Remove a lock that nobody holds; put it back if another build has taken it meanwhile."""
    aside = lock.with_name(f".lock.{os.getpid()}.stale")
    try:
        os.rename(lock, aside)
        moved = aside.stat()
        if not os.path.samestat(moved, status) or _holder(moved):
            os.link(aside, lock)
            state = "held by a build that has just begun"
        else:
            state = "removed"
        aside.unlink()
        return state
    except OSError as error:
        return f"stale, and cannot be removed: {error.strerror}"


def _file_system(path: Path) -> str:
    """Return the type of the file system of a path."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    mounts = [(row[1].replace("\\040", " "), row[2]) for row in map(str.split, lines)]
    holding = [one for one in mounts if Path(os.path.realpath(path)).is_relative_to(one[0])]
    return max(reversed(holding), key=lambda one: len(one[0]))[1]  # the last of several mounts at one place


# ---- the network


def _network(request: Section) -> Section:
    interfaces = {name: _interface(name) for _, name in socket.if_nameindex()}
    names = {name: _resolved(name) for name in request["names"]}
    return {"interfaces": interfaces, "names": names, "own": _first_usable(socket.gethostname())}


def _interface(name: str) -> Section:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        packed = struct.pack("256s", name.encode()[:15])
        try:
            address = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, packed)[20:24])  # SIOCGIFADDR
        except OSError:
            address = None
        flags = struct.unpack("H", fcntl.ioctl(probe.fileno(), 0x8913, packed)[16:18])[0]  # SIOCGIFFLAGS
    return {"address": address, "is_up": bool(flags & 1 and flags & 0x40), "is_loopback": bool(flags & 8)}


def _resolved(name: str) -> list[str]:
    try:
        return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _first_usable(name: str) -> str | None:
    """Return what gloo takes without GLOO_SOCKET_IFNAME: the first local address of the host name."""
    for address in _resolved(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return address
    return None


def _port(request: Section) -> Section:
    """Check that torch's store could listen at the master port, or else who does."""
    port = request["master_port"]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
            return {"fault": None, "holder": None}
        except OSError as error:
            return {"fault": error.strerror, "holder": _listener(port)}


def _listener(port: int) -> str | None:
    tables = filter(Path.exists, map(Path, ("/proc/net/tcp", "/proc/net/tcp6")))
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    listening = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
    return _process_with(lambda descriptor: _link(descriptor) in listening)


_SOFTWARE = (_python, _packages, _sources, _devices, _deepspeed_json, _data)
SECTIONS = {one.__name__[1:]: one for one in (*_SOFTWARE, _disk, _locks, _network, _port)}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
