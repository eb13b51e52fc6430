"""Check the network: the launcher's ways to the hosts, names, interfaces, the rendezvous, and the speed of links."""

import ipaddress
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from dsyolo.base.environment import all_variables
from dsyolo.cluster.agreed_port import DEFAULT as DEFAULT_PORT
from dsyolo.doctor.answers import Hello, LinkAnswer, NetworkAnswer, Port, Python, Result
from dsyolo.doctor.ask import Reply
from dsyolo.doctor.context import DoctorContext, DoctorOptions
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding
from dsyolo.doctor.hosts import Host, ssh_options

SLOW = 1e8  # bytes/s between hosts; a link of 1 Gbit/s carries 1.2e8
UNEVEN = 0.5  # share of the median bandwidth of all links
IFNAME = "GLOO_SOCKET_IFNAME"
# Sections without which no run can start: the check that an error of theirs fails, and the remedy.
NEEDED = {
    "sources": ("dsyolo", FAIL, "Copy the same checkout there, or install dsyolo into its environment."),
    "deepspeed_json": ("deepspeed_config", FAIL, "Repair dsyolo there first."),
    "data": ("data", FAIL, "Check that dsyolo and the data are there."),
}
FIX_FIRST = "Fix what failed above, and run this again."


def check_launcher(options: DoctorOptions, hosts: Sequence[Host]) -> tuple[list[Finding], str | None]:
    """Return findings on pdsh and on plain ssh to the first host, and the address of the ranks' rendezvous."""
    names, first = [host.name for host in hosts], hosts[0].name
    with ThreadPoolExecutor(1) as pool:
        pdsh = pool.submit(_pdsh, names, options.timeout_s) if len(hosts) > 1 else None
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


def reached(context: DoctorContext) -> Iterator[Finding]:
    """Check that every host answered completely, and that no two are the same machine."""
    remote = context.options.hostfile is not None
    for name, reply in context.replies.items():
        if reply.fault:
            yield Finding("ssh" if remote else "probe", name, FAIL, reply.fault, reply.remedy)
        elif remote:
            yield Finding("ssh", name, OK, "answers without a password")
        for section, answer in reply.sections.items():
            if answer.error:
                check, verdict, remedy = NEEDED.get(section, ("probe", WARNING, "Check it by hand."))
                yield Finding(check, name, verdict, f"{section} cannot be checked: {answer.error}", remedy)
    known: dict[tuple[str, str], str] = {}
    for host, hello in context.answers(Hello).items():
        other = known.setdefault((hello.machine, hello.network), host)
        if other != host:
            text = f"the same machine as {other}: two ranks would use one GPU"
            remedy = "Remove one from the hostfile, and give the other all slots."
            yield Finding("hostfile", host, FAIL, text, remedy)


def interfaces(context: DoctorContext) -> Iterator[Finding]:
    """Check that the address that gloo takes on each host is one that the others can reach."""
    addresses, several, ifnames = own_addresses(context), len(context.hosts) > 1, _ifnames(context)
    for host, network in context.answers(NetworkAnswer).items():
        given, address, known = ifnames.get(host), addresses.get(host), network.interfaces
        up = {name for name, one in known.items() if one.address and one.is_up}
        usable = [name for name in known if name in up and not known[name].is_loopback]
        choice = f"{IFNAME}={'|'.join(usable) or 'eth0'}"
        remedy = f"Put {choice} into .deepspeed_env." if several else f"Set {choice}."
        usual = address or ("none" if several else "loopback")
        text = f"{usual}, from the host's name, as {IFNAME} is not set"
        if given:
            text = f"{given}, {address}, from {IFNAME}"
            bad = next((name for name in given.split(",") if name not in up), None)
            if bad is not None:
                fault = "has no address or is down" if bad in known else f"is not among {', '.join(known)}"
                yield Finding("interface", host, FAIL, f"{IFNAME}={given}: {bad} {fault}", remedy)
                continue
        if several and (address is None or ipaddress.ip_address(address).is_loopback):
            rule = "other hosts cannot connect to it, and ranks would fail after minutes"
            remedy = f"{remedy} {context.forwarded.hint(IFNAME)}".strip()
            yield Finding("interface", host, FAIL, f"{text}: {rule}", remedy)
        else:
            yield Finding("interface", host, OK, text)


def _ifnames(context: DoctorContext) -> dict[str, str | None]:
    return {host: one.gloo_ifname for host, one in context.answers(Python).items()}


def own_addresses(context: DoctorContext) -> dict[str, str]:
    """Return by host the address that its ranks listen at."""
    ifnames = _ifnames(context)
    found: dict[str, str] = {}
    for host, network in context.answers(NetworkAnswer).items():
        # Without a name gloo takes the host's own address, and alone at last the loopback.
        address = network.own or ("127.0.0.1" if len(context.hosts) == 1 else None)
        if given := ifnames.get(host):
            one = network.interfaces.get(given.split(",")[0])
            address = one.address if one else None
        if address is not None and is_address(address):
            found[host] = address
    return found


def is_address(text: str) -> bool:
    """Return whether a text is an IP address, not a name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def names(context: DoctorContext) -> Iterator[Finding]:
    """Check that all hosts resolve the first one's name, and not to themselves."""
    if len(context.hosts) < 2:
        return
    first, master = context.names[0].rpartition("@")[2], context.options.master_addr
    for host, network in context.answers(NetworkAnswer).items():
        for name in dict.fromkeys(filter(None, (first, master))):
            addresses, finding = network.names.get(name, []), partial(Finding, "names", host)
            verdict = FAIL if name == master else WARNING
            remedy = f"Add {name} with its address to /etc/hosts there, or to the name server."
            if not addresses:
                yield finding(verdict, f"{name} cannot be resolved", remedy)
            elif host != context.names[0] and _is_loopback(addresses):
                yield finding(verdict, f"{name} is {addresses[0]}, which is this host itself", remedy)
            elif not is_address(name):
                listed = "itself" if _is_loopback(addresses) else ", ".join(sorted(addresses)[:2])
                yield finding(OK, f"{name} is {listed}")


def rendezvous_address(context: DoctorContext) -> Iterator[Finding]:
    """Check that the rendezvous address belongs to the first host alone: that of Docker's bridge is the same on all."""
    networks = context.answers(NetworkAnswer)
    found = {name: {one.address for one in net.interfaces.values()} for name, net in networks.items()}
    first, master = context.names[0], context.master
    if master is None or len(context.hosts) < 2 or first not in found:
        return
    addresses = [master] if is_address(master) else networks[first].names.get(master, [])
    others = [name for name in found if name != first and found[name] & set(addresses)]
    taken = set(addresses).union(*(found[name] for name in others))
    own = ", ".join(sorted(a for a in found[first] if a and a not in taken and not _is_loopback([a])))
    text = f"rendezvous at {master}, port {context.options.master_port}"
    remedy = f"Give the launcher and this command --master_addr with another address of {first}: {own}."
    if not own:
        remedy = f"Give {first} an address of its own, or remove its other names from the hostfile."
    if others:
        yield Finding("master", "", FAIL, f"{text}, which is an address of {', '.join(others)}", remedy)
    elif not found[first] & set(addresses):
        yield Finding("master", "", WARNING, f"{text}, which no interface of {first} has", remedy)
    else:
        yield Finding("master", "", OK, text)


def _is_loopback(addresses: Sequence[str]) -> bool:
    return all(is_address(one) and ipaddress.ip_address(one).is_loopback for one in addresses)


def port(context: DoctorContext) -> Iterator[Finding]:
    """Check that the first rank can listen at the master port."""
    number = context.options.master_port
    for host, found in context.answers(Port).items():
        if found.fault and number == DEFAULT_PORT and len(context.hosts) == 1:
            yield Finding("port", host, OK, f"{number} is taken, so the run takes a free one")
        elif found.fault:
            by = f", taken by {found.holder}" if found.holder else ""
            remedy = "End that process, or give the launcher and this command another --master_port."
            yield Finding("port", host, FAIL, f"{number}: {found.fault}{by}", remedy)
        else:
            yield Finding("port", host, OK, f"{number} is free on the first host")


def links(context: DoctorContext, ranks: Sequence[str], replies: Sequence[Reply]) -> Iterator[Finding]:
    """Yield what the test's ranks (by their hosts) found: hosts out of reach, separate folders of runs, slow links."""
    results = [reply.get(Result) for reply in replies]
    unreached = [(i, to) for i, one in enumerate(results) if one for to in one.unreached if to < len(ranks)]
    for i, to in unreached:
        text = f"cannot connect to the ranks of {ranks[to]}"
        remedy = f"Open all ports between the hosts, or set {IFNAME} to the network that they share."
        yield Finding("link", ranks[i], FAIL, text, remedy)
    yield from _runs_folder(context, ranks, results)
    for host, result, reply in zip(ranks, results, replies, strict=True):
        if unreached:
            break
        if result is None:
            text = f"the network test gave no result: {reply.fault or 'it was ended'}"
            yield Finding("link", host, FAIL, text, "Check that torch and gloo work there.")
        elif result.fault:
            steps = {"meet": "no rendezvous at the first host", "measure": "gloo fails"}
            text = f"{steps.get(result.fault, result.fault)}: {result.text}"
            look = "Check firewalls, --master_addr and the interface."
            remedy = look if result.fault == "meet" else FIX_FIRST
            yield Finding("link", host, FAIL, text, remedy)
    measured = [
        (i, link) for i, one in enumerate(results) if one for link in one.links if link.to < len(ranks)
    ]
    if measured:
        yield from _speeds(context, ranks, measured)


def _runs_folder(
    context: DoctorContext, ranks: Sequence[str], results: Sequence[Result | None]
) -> Iterator[Finding]:
    """Check that all hosts share the folder of runs, since all ranks write into one checkpoint."""
    folder = context.options.project
    for host, result in zip(ranks, results, strict=True):
        if result is None or result.sees_token is None or host == ranks[0]:
            continue
        if result.sees_token:
            yield Finding("project", "", OK, f"all hosts share {folder}")
        else:
            text = f"{folder} is not the same folder as on {ranks[0]}, so no checkpoint could be written"
            remedy = "Set --project to a folder on a disk that all hosts mount."
            yield Finding("project", host, FAIL, text, remedy)


def _speeds(
    context: DoctorContext, ranks: Sequence[str], measured: Sequence[tuple[int, LinkAnswer]]
) -> Iterator[Finding]:
    usual = statistics.median(link.bytes_per_s for _, link in measured)
    for i, link in measured:
        source, target = ranks[i], ranks[link.to]
        ends = f"two ranks on {source}" if source == target else f"{source} to {target}"
        text = f"{ends}: {link.bytes_per_s / 1e6:.0f} MB/s, {link.latency_s * 1e6:.0f} us, over gloo"
        text += _step_cost(context, link) if source != target else ""
        uneven = len(context.hosts) > 2 and link.bytes_per_s < UNEVEN * usual
        if source != target and (link.bytes_per_s < SLOW or uneven):
            rule = f"the others have {usual / 1e6:.0f} MB/s" if uneven else f"less than {SLOW / 1e6:.0f} MB/s"
            remedy = f"Check cable, switch and {IFNAME}. ZeRO 3 sends 1.5 times as much, a pipeline least."
            yield Finding("link", "", WARNING, f"{text}: {rule}", remedy)
        else:
            yield Finding("link", "", OK, text)


def _step_cost(context: DoctorContext, link: LinkAnswer) -> str:
    """Return the seconds of a ring all-reduce of the gradients over all hosts, as text; empty without --model."""
    if context.num_parameters is None:
        return ""
    hosts = len(context.hosts)
    seconds = 2 * (hosts - 1) / hosts * 4 * context.num_parameters / max(link.bytes_per_s, 1.0)
    return f"; {context.options.model}'s gradients take {seconds:.2g} s a step"
