"""A cluster in a box: hosts that share this machine's disk, but have a network, a name, processes and an sshd of their own.

    with Cluster(2) as cluster:
        words = [*cluster.deepspeed(), "dsyolo/train.py", "--data", "data.yaml"]
        cluster.popen(words, cwd=place).wait()
        sent, received = cluster.traffic()[0]

A host is one process in Linux namespaces of its own (network, host name, mounts, process ids), joined to the others by
a veth pair and a bridge that stands in a namespace too. So this machine's network is never touched, any number of clusters
stand side by side, and nothing needs removing: when the process that made a cluster ends, even by SIGKILL, the pipes to
its hosts close, the first process of each ends, and the kernel takes everything inside with it.

Needs root and the packages pdsh, openssh-server, openssh-client and iproute2: see `why_not`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NET = "10.77.0."  # of all clusters: none sees another, nor this machine's network
INTERFACE = "eth0"  # of a host, as in most machines
NEW = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
TOOLS = ("unshare", "nsenter", "ip", "pdsh", "ssh", "ssh-keygen", "sshd")
QUIET = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $f; done 2>/dev/null || true"

# The first process of a host. bash, because as process 1 it also buries the orphans.
HOST = f"""
set -e
hostname $1
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind $4/hosts /etc/hosts
{QUIET}
ip link set lo up
echo made
read -r _   # the link is there
ip address add $2/24 dev {INTERFACE}
ip link set {INTERFACE} up
$3 -f $4/sshd_config -o ListenAddress=$2
until (exec 3<>/dev/tcp/$2/22) 2>/dev/null; do sleep 0.02; done
echo ready
read -r _   # until the pipe is closed
"""
SWITCH = f"{QUIET}; ip link add name switch type bridge && ip link set switch up && echo made && read -r _"

SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers *@{net}*
UseDNS no
MaxStartups 100
LogLevel ERROR
"""
SSH = """
Host *
    User root
    IdentityFile {folder}/key
    IdentitiesOnly yes
    IdentityAgent none
    HostKeyAlias cluster
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    BatchMode yes
    ConnectTimeout 10
    LogLevel ERROR
"""


class Traffic(NamedTuple):
    """Bytes through a host's interface since it was made, with the headers of Ethernet, IP and TCP."""

    sent: int
    received: int


def why_not() -> str | None:
    """Return what a cluster lacks here, in words; None: it can be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "clusters are made of Linux network namespaces, by root"
    missing = [tool for tool in TOOLS if not _find(tool)]
    if missing:
        return (
            f"{', '.join(missing)} not found: install pdsh openssh-server openssh-client iproute2 util-linux"
        )
    tried = subprocess.run(
        [*NEW, "sh", "-c", "mount -t tmpfs tmpfs /run && ip link add name one type veth peer name other"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """`num_hosts` hosts, `node0` and on, from `with` to its end.

    Args:
        num_hosts: of them.
        carried: variables that the deepspeed launcher takes to the ranks of all hosts, beside those that it must.

    Attributes:
        names: of the hosts, as ssh and a hostfile know them.
        addresses: theirs.
        folder: keys and configurations, a temporary one.
        environment: what `popen` gives its command, beside the caller's environment.
    """

    def __init__(self, num_hosts: int, carried: Mapping[str, str] | None = None) -> None:
        self.names = [f"node{i}" for i in range(num_hosts)]
        self.addresses = [f"{NET}{i + 1}" for i in range(num_hosts)]
        self._carried = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **(carried or {}),
        }
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        if problem := why_not():
            raise RuntimeError(problem)
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster_")))
            self._write_files()
            self._switch = stack.enter_context(_Namespace(SWITCH))
            self._hosts = [
                stack.enter_context(_Namespace(HOST, name, address, str(_find("sshd")), str(self.folder)))
                for name, address in zip(self.names, self.addresses, strict=True)
            ]
            for i, host in enumerate(self._hosts):
                self._on_switch(f"ip link add name port{i} type veth peer name {INTERFACE} netns {host.pid}")
                self._on_switch(f"ip link set port{i} master switch up")
                host.go_on()
            for host in self._hosts:
                host.wait_for("ready")
            self._processes: list[subprocess.Popen] = []
            stack.callback(self._end_processes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def hostfile(self, slots: int = 1) -> Path:
        """A hostfile with all hosts, of `slots` ranks each."""
        path = self.folder / f"hostfile_{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def deepspeed(self, slots: int = 1) -> list[str]:
        """The launcher's words before the script. It asks the first host's address by a plain ssh, without our configuration."""
        told = ["--no_ssh_check", "--master_addr", self.addresses[0]]
        return ["deepspeed", "--hostfile", str(self.hostfile(slots)), *told]

    def popen(
        self, command: Sequence[str], *, host: int = 0, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen:
        """Starts `command` with the network and the name of a host; `options` are Popen's. It is ended with the cluster.

        It keeps the process ids and mounts of this machine, so that signals reach it; what it starts on hosts through
        ssh has theirs.
        """
        inside = ["nsenter", "--target", str(self._hosts[host].pid), "--net", "--uts", "--", *command]
        everything = {**os.environ, **(env or {}), **self.environment}
        process = subprocess.Popen(inside, env=everything, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def ssh(self, host: int, words: Sequence[object]) -> list[str]:
        """For `popen`: `words` as a command on a host, in all of its namespaces. Signals do not reach it."""
        return ["ssh", "-F", f"{self.folder}/ssh_config", self.names[host], shlex.join(map(str, words))]

    def run(self, host: int, command: str, timeout_s: float = 60) -> str:
        """Return the output of a short shell command on a host, in all of its namespaces."""
        return self._hosts[host].run(command, timeout_s)

    def traffic(self) -> list[Traffic]:
        """Return the bytes of each host until now."""
        return [read_traffic(host.pid) for host in self._hosts]

    def link(self, host: int, *, up: bool) -> None:
        """Pulls a host's cable out of the switch, or puts it back: what is sent is lost without an error."""
        self._on_switch(f"ip link set port{host} {'up' if up else 'down'}")
        if up:  # the kernel takes its time to believe it
            other = self.addresses[host - 1]
            self.run(
                host, f"until timeout 0.2 bash -c '</dev/tcp/{other}/22' 2>/dev/null; do sleep 0.02; done"
            )

    def pids(self, host: int) -> list[int]:
        """Processes with a host's network, by this machine's ids."""
        network = os.readlink(f"/proc/{self._hosts[host].pid}/ns/net")
        return [pid for pid in all_pids() if _quietly(os.readlink, f"/proc/{pid}/ns/net") == network]

    def ranks(self) -> dict[int, int]:
        """The processes of a run's ranks now: this machine's id by rank."""
        found = {}
        for pid in [pid for host in range(len(self.names)) for pid in self.pids(host)]:
            rank = variable_of(pid, "RANK")
            if rank is not None and variable_of(parent_of(pid), "RANK") is None:  # else a loader's worker
                found[int(rank)] = pid
        return dict(sorted(found.items()))

    def _on_switch(self, command: str) -> None:
        self._switch.run(command, entered="--net")  # among this machine's process ids, which name the hosts

    def _write_files(self) -> None:
        folder = self.folder
        for key in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(command, check=True)
        (folder / "known_hosts").write_text("cluster " + (folder / "host_key.pub").read_text())
        (folder / "sshd_config").write_text(SSHD.format(folder=folder, net=NET))
        hosts = list(zip(self.names, self.addresses, strict=True))
        known = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts)]
        (folder / "hosts").write_text("\n".join(known) + "\n")
        lines = [f"Host {name}\n    HostName {address}" for name, address in hosts]
        (folder / "ssh_config").write_text("\n".join([*lines, SSH.format(folder=folder)]))
        (folder / "deepspeed_env").write_text(
            "".join(f"{key}={value}\n" for key, value in self._carried.items())
        )
        self.environment = {
            **self._carried,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PDSH_SSH_ARGS_APPEND": f"-F {folder}/ssh_config",
            "DS_ENV_FILE": f"{folder}/deepspeed_env",
        }

    def _end_processes(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Namespace:
    """A process that holds namespaces open, until its standard input is closed."""

    def __init__(self, script: str, *words: str) -> None:
        self._command = [*NEW, "bash", "-c", script, "bash", *words]

    def __enter__(self) -> _Namespace:
        pipe = subprocess.PIPE
        self._outer = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.wait_for("made")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.pid = int(children[0])
        return self

    def __exit__(self, *_: Any) -> None:
        self._outer.kill()  # and with it, by --kill-child, all in the namespaces
        self._outer.communicate()

    def go_on(self) -> None:
        self._outer.stdin.write("\n")
        self._outer.stdin.flush()

    def wait_for(self, word: str) -> None:
        if self._outer.stdout.readline().strip() != word:
            said = self._outer.communicate()[1]
            raise RuntimeError(f"a host of the cluster was not {word}: {said}")

    def run(self, command: str, timeout_s: float = 60, entered: str = "--all") -> str:
        inside = ["nsenter", "--target", str(self.pid), entered, "--", "bash", "-c", command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"{command!r} gave status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout


def _find(tool: str) -> str | None:
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def read_traffic(pid: int | str = "self") -> Traffic:
    """Return the traffic of the host that a process runs on."""
    numbers = Path(f"/proc/{pid}/net/dev").read_text().split(f"{INTERFACE}:")[1].split()
    return Traffic(sent=int(numbers[8]), received=int(numbers[0]))


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def variable_of(pid: int, name: str) -> str | None:
    """Return an environment variable that a process was started with."""
    content = _quietly(Path(f"/proc/{pid}/environ").read_bytes) or b""
    values = dict(item.partition(b"=")[::2] for item in content.split(b"\0"))
    return values[name.encode()].decode() if name.encode() in values else None


def parent_of(pid: int) -> int:
    content = _quietly(Path(f"/proc/{pid}/stat").read_text) or ") ? 0"
    return int(content.rpartition(") ")[2].split()[1])


def _quietly(read: Any, *args: Any) -> Any:
    """None for a process that has gone meanwhile."""
    try:
        return read(*args)
    except OSError:
        return None
