"""Check the network: ssh, host names, interfaces, the rendezvous address and port, and the speed of links."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dsyolo.doctor.answers import Hello, Interface, LinkAnswer, NetworkAnswer, Port, Python, Result
from dsyolo.doctor.ask import Reply
from dsyolo.doctor.context import DoctorContext
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding
from dsyolo.doctor.hosts import forwarding_hint

SLOW = 1e8  # bytes/s between hosts; a link of 1 Gbit/s carries 1.2e8
UNEVEN = 0.5  # of the median of all links
IFNAME = "GLOO_SOCKET_IFNAME"
FIX_FIRST = "Fix what failed above, and run this again."


def reached(context: DoctorContext) -> Iterator[Finding]:
    """Check that every host answered completely, and that no two are the same machine."""
    remote = context.options.hostfile is not None
    for name, reply in context.replies.items():
        if reply.fault:
            yield Finding("ssh" if remote else "probe", name, FAIL, reply.fault, reply.remedy)
        elif remote:
            yield Finding("ssh", name, OK, "answers without a password")
        for section, answer in reply.sections.items():
            if answer.error and section not in ("sources", "data", "deepspeed_json"):
                text = f"{section} could not be checked: {answer.error}"
                yield Finding("probe", name, WARNING, text, "Check it by hand.")
    known: dict[tuple[str, str], str] = {}
    for host, hello in context.each(Hello):
        other = known.setdefault((hello.machine, hello.network), host)
        if other != host:
            text = f"the same machine as {other}: two ranks would use one GPU"
            remedy = "Remove one from the hostfile, and give the other all slots."
            yield Finding("hostfile", host, FAIL, text, remedy)


def interfaces(context: DoctorContext) -> Iterator[Finding]:
    """Check that the address that gloo takes on each host is one that the others can reach."""
    addresses, several = own_addresses(context), len(context.hosts) > 1
    pythons = dict(context.each(Python))
    for host, network in context.each(NetworkAnswer):
        given = pythons[host].environment.get(IFNAME) if host in pythons else None
        usable = [name for name, one in network.interfaces.items() if _is_usable(one)]
        choice = f"{IFNAME}={usable[0] if len(usable) == 1 else '|'.join(usable) or 'eth0'}"
        remedy = f"Put {choice} into .deepspeed_env." if several else f"Set {choice}."
        address = addresses.get(host)
        if given:
            bad = [name for name in given.split(",") if not _has_address(network, name)]
            if bad:
                missing = f"is not among {', '.join(network.interfaces)}"
                down = "has no address or is down"
                text = f"{IFNAME}={given}: {bad[0]} {down if bad[0] in network.interfaces else missing}"
                yield Finding("interface", host, FAIL, text, remedy)
                continue
            text = f"{given}, {address}, from {IFNAME}"
        else:
            text = f"{address or 'none'}, from the host's name, as {IFNAME} is not set"
        if several and (address is None or ipaddress.ip_address(address).is_loopback):
            rule = "other hosts cannot connect to it, and ranks would fail after minutes"
            remedy = f"{remedy} {forwarding_hint(context.forwarded, IFNAME)}".strip()
            yield Finding("interface", host, FAIL, f"{text}: {rule}", remedy)
        else:
            yield Finding("interface", host, OK, text if several else text.replace("none,", "loopback,"))


def own_addresses(context: DoctorContext) -> dict[str, str]:
    """Return by host the address that its ranks listen at."""
    pythons = dict(context.each(Python))
    found: dict[str, str] = {}
    for host, network in context.each(NetworkAnswer):
        given = pythons[host].environment.get(IFNAME) if host in pythons else None
        one = network.interfaces.get(given.split(",")[0]) if given else None
        address = (one.address if one else None) if given else network.own
        if address is None and not given and len(context.hosts) == 1:
            address = "127.0.0.1"  # gloo's last resort
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


def _is_usable(interface: Interface) -> bool:
    return bool(interface.address) and interface.is_up and not interface.is_loopback


def _has_address(network: NetworkAnswer, name: str) -> bool:
    one = network.interfaces.get(name)
    return one is not None and one.address is not None and one.is_up


def names(context: DoctorContext, master: str | None) -> Iterator[Finding]:
    """Check that all hosts resolve the first one's name, and not to themselves."""
    if len(context.hosts) < 2:
        return
    first = context.names[0].rpartition("@")[2]
    wanted = [first, *([master] if master and master != first else [])]
    for host, network in context.each(NetworkAnswer):
        for name in wanted:
            addresses, needed = network.names.get(name, []), name == master
            verdict = FAIL if needed else WARNING
            remedy = f"Add {name} with its address to /etc/hosts there, or to the name server."
            if not addresses:
                yield Finding("names", host, verdict, f"{name} cannot be resolved", remedy)
            elif host != context.names[0] and _is_loopback(addresses):
                text = f"{name} is {addresses[0]}, which is this host itself"
                yield Finding("names", host, verdict, text, remedy)
            elif not is_address(name):
                listed = ", ".join(sorted(addresses)[:2])
                same = host == context.names[0] and _is_loopback(addresses)
                yield Finding("names", host, OK, f"{name} is {'itself' if same else listed}")


def rendezvous_address(context: DoctorContext, master: str | None) -> Iterator[Finding]:
    """Check that the rendezvous address belongs to the first host alone: that of Docker's bridge is the same on all."""
    found = {
        name: {one.address for one in net.interfaces.values()} for name, net in context.each(NetworkAnswer)
    }
    first = context.names[0]
    if master is None or len(context.hosts) < 2 or first not in found:
        return
    addresses = (
        dict(context.each(NetworkAnswer))[first].names.get(master, []) if not is_address(master) else [master]
    )
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
    for host, found in context.each(Port):
        number = context.options.master_port
        if found.fault:
            by = f" by {found.holder}" if found.holder else ""
            text = f"{number}: {found.fault}{f', taken{by}' if by else ''}"
            remedy = "End that process, or give the launcher and this command another --master_port."
            yield Finding("port", host, FAIL, text, remedy)
        else:
            yield Finding("port", host, OK, f"{number} is free on the first host")


class TestRank(NamedTuple):
    """A rank of the network test."""

    host: str
    key: str  # of its reply


def links(
    context: DoctorContext, ranks: Sequence[TestRank], replies: Mapping[str, Reply]
) -> Iterator[Finding]:
    """Yield what the network test found: hosts out of reach, separate folders of runs, slow links."""
    results = {i: replies[rank.key].get(Result) for i, rank in enumerate(ranks)}
    silent = [i for i, result in results.items() if result is None]
    unreached = [(i, to) for i, result in results.items() if result for to in result.unreached]
    for i, to in unreached:
        if to < len(ranks):
            text = f"cannot connect to the ranks of {ranks[to].host}"
            remedy = f"Open all ports between the hosts, or set {IFNAME} to the network that they share."
            yield Finding("link", ranks[i].host, FAIL, text, remedy)
    yield from _runs_folder(context, ranks, results)
    faulty = {i: result for i, result in results.items() if result and result.fault and not result.unreached}
    if not unreached:
        for i in silent:
            text = f"the network test gave no result: {replies[ranks[i].key].fault or 'it was ended'}"
            yield Finding("link", ranks[i].host, FAIL, text, "Check that torch and gloo work there.")
        for i, result in faulty.items():
            is_apart = result.fault == "meet"
            remedy = "Check firewalls, --master_addr and the interface." if is_apart else FIX_FIRST
            what = {"meet": "no rendezvous at the first host", "measure": "gloo fails"}.get(result.fault)
            yield Finding("link", ranks[i].host, FAIL, f"{what or result.fault}: {result.text}", remedy)
    measured = [
        (i, link) for i, result in results.items() if result for link in result.links if link.to < len(ranks)
    ]
    if measured:
        yield from _speeds(context, ranks, measured)


def _runs_folder(
    context: DoctorContext, ranks: Sequence[TestRank], results: Mapping[int, Result | None]
) -> Iterator[Finding]:
    """Check that all hosts share the folder of runs, since all ranks write into one checkpoint."""
    if len({rank.host for rank in ranks}) < 2:
        return
    for i, result in results.items():
        if result and result.sees_token is not None and ranks[i].host != ranks[0].host:
            folder = context.options.project
            if result.sees_token:
                yield Finding("project", "", OK, f"all hosts share {folder}")
            else:
                text = f"{folder} is not the same folder as on {ranks[0].host}, so no checkpoint could be written"
                remedy = "Set --project to a folder on a disk that all hosts mount."
                yield Finding("project", ranks[i].host, FAIL, text, remedy)


def _speeds(
    context: DoctorContext, ranks: Sequence[TestRank], measured: Sequence[tuple[int, LinkAnswer]]
) -> Iterator[Finding]:
    usual = statistics.median(link.bytes_per_s for _, link in measured)
    for i, link in measured:
        source, target = ranks[i].host, ranks[link.to].host
        where = f"{source} to {target}"
        if source == target:
            where = f"two ranks on {source if len(context.hosts) > 1 else 'this machine'}"
        text = f"{where}: {link.bytes_per_s / 1e6:.0f} MB/s, {link.latency_s * 1e6:.0f} us, over gloo"
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
