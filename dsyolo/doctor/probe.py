"""Looks at one host, and prints what it found: a JSON object per line, a line per section.

`doctor` sends this file to the host's Python through ssh, so it needs nothing but the standard library there, and is
the same on every host whatever is installed. What a section cannot find is an error of that section alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIFE_S = 300  # after so long the probe ends by itself, for nobody may be left who could end it
QUIET_S = 1800  # without a write a build that cannot be seen is taken for dead; one file takes minutes
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's constant
# of processes that other hosts can run: file systems that these share
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "virtiofs")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "TORCH_EXTENSIONS_DIR",
    "XDG_CACHE_HOME",
)
Section = dict[str, Any]


def main(request: Section) -> None:
    """Prints a line for the beginning, and one for each section of the request."""
    signal.alarm(LIFE_S)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what imported packages print is no answer
    _say(out, {"section": "hello", "time": time.time(), "hostname": socket.gethostname(), **identity()})
    for name in request["sections"]:
        try:
            found = SECTIONS[name](request)
        except Exception as error:  # of whatever kind: it is told, and the next section has its turn
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        _say(out, {"section": name, **found})


def _say(out: Any, line: Section) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


def identity() -> Section:
    """The machine, and its network: two names with the same of both are one host."""
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
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {
        "executable": sys.executable,
        "version": platform.python_version(),
        "folder": os.getcwd(),
        "environment": variables,
    }


def _packages(request: Section) -> Section:
    """Versions and places of packages; those that runs need first are imported, since one that is there may fail."""
    found = {}
    for name, module in request["packages"].items():
        one: Section = {"version": None, "path": None, "error": None}
        try:
            one["version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            one["error"] = "not installed"
        if module:
            try:
                loaded = importlib.import_module(module)
                one["path"] = os.path.dirname(loaded.__file__ or "")
                one["version"] = str(getattr(loaded, "__version__", one["version"]))
                one["error"] = None
            except Exception as error:
                one["error"] = f"{type(error).__name__}: {error}"[:500]
        found[name] = one
    return {"packages": found}


def _sources(request: Section) -> Section:
    """A hash of each file of dsyolo that a run reads."""
    module = importlib.import_module("dsyolo")
    top = Path(module.__file__ or "").parent
    files = sorted(path for path in top.rglob("*") if path.suffix in (".py", ".yaml") and path.is_file())
    hashes = {
        str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files
    }
    return {"folder": str(top), "files": hashes}


def _devices(request: Section) -> Section:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    accelerator, gpus = os.environ.get("DS_ACCELERATOR", ""), []
    try:
        cuda = importlib.import_module("torch").cuda
        gpus = [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    except ImportError:
        pass  # the section `packages` tells of it
    return {"cores": cores, "gpus": gpus, "accelerator": accelerator or ("cuda" if gpus else "cpu")}


def _compilers(request: Section) -> Section:
    return {"compiler": shutil.which(os.environ.get("CXX", "c++")), "ninja": shutil.which("ninja")}


def _deepspeed_json(request: Section) -> Section:
    """Judged by the dsyolo of this host, where the folders that it names must be."""
    path = request["deepspeed_config"]
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None
    checker = importlib.import_module("dsyolo.config.deepspeed.config")
    reader = importlib.import_module("dsyolo.config.deepspeed.json_reader")
    errors = importlib.import_module("dsyolo.base.errors")
    accelerator = _devices(request)["accelerator"]
    try:
        checker.check(
            reader.read_source(path),
            world_size=request["world_size"],
            accelerator=accelerator,
            layers=request["layers"],
        )
    except errors.UserError as error:
        return {"digest": digest, "problems": list(error.problems) or [error.headline]}
    return {"digest": digest, "problems": []}


def _data(request: Section) -> Section:
    """The data set as this host's dsyolo sees it: data/fingerprint.py."""
    fingerprint = importlib.import_module("dsyolo.data.fingerprint")
    errors = importlib.import_module("dsyolo.base.errors")
    try:
        return {"problems": [], **fingerprint.of_data(request["data"], request.get("buckets"))}
    except errors.UserError as error:
        return {"problems": list(error.problems) or [error.headline]}


# ---- the machine


def _disk(request: Section) -> Section:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folders = {"runs": request["project"], "cache": os.path.join(cache, "dsyolo"), "shm": "/dev/shm"}
    return {"folders": {name: _room(os.path.abspath(path)) for name, path in folders.items()}}


def _room(path: str) -> Section:
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions alone do not tell
            fault = None
    except OSError as error:
        fault = f"{there}: {error.strerror}"
    status = os.statvfs(there) if os.path.exists(there) else os.statvfs(os.path.dirname(there))
    return {"path": path, "free": status.f_bavail * status.f_frsize, "fault": fault}


def _locks(request: Section) -> Section:
    """Locks of compiled ops: whoever finds one waits, without a word and for ever, until it is gone."""
    default = os.path.join(os.path.expanduser("~"), ".cache")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or default, "torch_extensions"
    )
    found = []
    for top, folders, files in os.walk(root):
        if os.path.relpath(top, root).count(os.sep) >= 3:
            folders.clear()
        if "lock" in files:
            found.append(_judge_lock(Path(top, "lock"), request["fix"]))
    return {"root": root, "locks": found[:100]}


def _judge_lock(lock: Path, fix: bool) -> Section:
    status = lock.stat()
    holder = _holder(status)
    state = f"held by {holder}" if holder else _may_be_held(lock, status) or "stale"
    if state == "stale" and fix:
        state = _remove(lock, status)
    owner = _user(status.st_uid)
    return {"path": str(lock), "age_s": time.time() - status.st_mtime, "owner": owner, "state": state}


def _holder(status: os.stat_result) -> str | None:
    """The process that has the lock open, as torch's builds have theirs until they are done."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            for number in os.listdir(f"/proc/{name}/fd"):
                other = os.stat(f"/proc/{name}/fd/{number}")
                if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
                    return f"process {name} ({Path('/proc', name, 'comm').read_text().strip()})"
        except OSError:
            continue  # it ended, or is not ours to look at
    return None


def _may_be_held(lock: Path, status: os.stat_result) -> str | None:
    """Why a process that cannot be seen from here may be building; None where that can be ruled out."""
    if os.geteuid() not in (0, status.st_uid):
        return "perhaps held: only its owner sees by whom"
    kind, sees_all = _file_system(lock), _sees_all_processes()
    is_private = kind == "overlay" and status.st_dev == os.stat("/").st_dev  # a container's own root
    apart = kind in REMOTE or kind.startswith("fuse") or not (sees_all or is_private)
    written = max((path.lstat().st_mtime for path in lock.parent.iterdir()), default=status.st_mtime)
    if apart and time.time() - written < QUIET_S:
        return f"perhaps held: another host or container may build in it, as {QUIET_S // 60} min without a write would rule out"
    return None


def _sees_all_processes() -> bool:
    return _link("/proc/self/ns/pid") == f"pid:[{INITIAL_PID_NAMESPACE}]"


def _remove(lock: Path, status: os.stat_result) -> str:
    """Removes a lock that nobody holds. Another may do so at this moment and a build take a new one: it is put back."""
    aside = lock.with_name(f".lock.{os.getpid()}.stale")
    try:
        os.rename(lock, aside)
        moved = aside.stat()
        if (moved.st_dev, moved.st_ino) != (status.st_dev, status.st_ino) or _holder(moved):
            os.link(aside, lock)
            state = "held by a build that has just begun"
        else:
            state = "removed"
        aside.unlink()
        return state
    except OSError as error:
        return f"stale, and cannot be removed: {error.strerror}"


def _file_system(path: Path) -> str:
    """The kind of file system that `path` lies on."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, this, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if len(place) >= len(best) and Path(os.path.realpath(path)).is_relative_to(place):
            best, kind = place, this
    return kind


def _user(uid: int) -> str:
    try:
        return importlib.import_module("pwd").getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


# ---- the network


def _network(request: Section) -> Section:
    names = {name: _resolved(name) for name in request["names"]}
    return {
        "interfaces": {name: _interface(name) for _, name in socket.if_nameindex()},
        "names": names,
        "own": _first_usable(socket.gethostname()),
    }


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
        return list(dict.fromkeys(info[4][0] for info in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _first_usable(name: str) -> str | None:
    """What gloo takes where GLOO_SOCKET_IFNAME is not set: the first address of the host name that is here."""
    for address in _resolved(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, 0))
                return address
            except OSError:
                continue
    return None


def _port(request: Section) -> Section:
    """Whether torch's store could listen there, and otherwise who does."""
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
    inodes = {inode for local, state, inode in _sockets() if local.endswith(f":{port:04X}") and state == "0A"}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = {_link(f"/proc/{name}/fd/{number}") for number in os.listdir(f"/proc/{name}/fd")}
        except OSError:
            continue
        if links & {f"socket:[{inode}]" for inode in inodes}:
            return f"process {name} ({Path('/proc', name, 'comm').read_text().strip()})"
    return None


def _sockets() -> Iterator[tuple[str, str, str]]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if os.path.exists(table) else ():
            words = line.split()
            yield words[1], words[3], words[9]


SECTIONS: dict[str, Callable[[Section], Section]] = {
    "python": _python,
    "packages": _packages,
    "sources": _sources,
    "devices": _devices,
    "compilers": _compilers,
    "deepspeed_json": _deepspeed_json,
    "disk": _disk,
    "locks": _locks,
    "network": _network,
    "port": _port,
    "data": _data,
}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
