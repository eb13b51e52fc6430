"""Judges the ways between hosts: ssh, names, the interface and the port that ranks meet at, and how fast links are."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dsyolo.doctor.answers import Hello, Interface, LinkAnswer, NetworkAnswer, Port, Python, Result
from dsyolo.doctor.ask import Reply
from dsyolo.doctor.context import DoctorContext
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding
from dsyolo.doctor.hosts import shown_env

SLOW = 1e8  # bytes/s between hosts; a link of 1 Gbit/s carries 1.2e8
UNEVEN = 0.5  # of the median of all links
IFNAME = "GLOO_SOCKET_IFNAME"
MEND_FIRST = "Mend what failed above, and look again."


def reached(case: DoctorContext) -> Iterator[Finding]:
    """Every host answered, whole, and is another one than the others."""
    remote = case.options.hostfile is not None
    for name, reply in case.replies.items():
        if reply.fault:
            yield Finding("ssh" if remote else "probe", name, FAIL, reply.fault, reply.remedy)
        elif remote:
            yield Finding("ssh", name, OK, "answers without a password")
        for section, answer in reply.sections.items():
            if answer.error and section not in ("sources", "data", "deepspeed_json"):
                text = f"{section} could not be looked at: {answer.error}"
                yield Finding("probe", name, WARNING, text, "Look at it by hand.")
    of: dict[tuple[str, str], str] = {}
    for host, hello in case.each(Hello):
        other = of.setdefault((hello.machine, hello.network), host)
        if other != host:
            text = f"the same machine as {other}: ranks would take the same GPUs and cores twice"
            remedy = "Leave one out of the hostfile, and give the other all slots."
            yield Finding("hostfile", host, FAIL, text, remedy)


def interfaces(case: DoctorContext) -> Iterator[Finding]:
    """The address that gloo gives to each host's ranks must be one that the others can reach."""
    addresses, several = own_addresses(case), len(case.hosts) > 1
    pythons = dict(case.each(Python))
    for host, network in case.each(NetworkAnswer):
        given = pythons[host].environment.get(IFNAME) if host in pythons else None
        usable = [name for name, one in network.interfaces.items() if _is_usable(one)]
        choice = f"{IFNAME}={usable[0] if len(usable) == 1 else '|'.join(usable) or 'eth0'}"
        remedy = f"Write {choice} into .deepspeed_env." if several else f"Set {choice}."
        address = addresses.get(host)
        if given:
            bad = [name for name in given.split(",") if not _has_address(network, name)]
            if bad:
                there = f"is not among {', '.join(network.interfaces)}"
                down = "has no address or is down"
                text = f"{IFNAME}={given}: {bad[0]} {down if bad[0] in network.interfaces else there}"
                yield Finding("interface", host, FAIL, text, remedy)
                continue
            text = f"{given}, {address}, as {IFNAME} says"
        else:
            text = f"{address or 'none'}, since the host's name gives it and {IFNAME} is not set"
        if several and (address is None or ipaddress.ip_address(address).is_loopback):
            rule = "no other host can connect to it, and ranks would die after minutes"
            remedy = f"{remedy} {shown_env(case.crossing, IFNAME)}".strip()
            yield Finding("interface", host, FAIL, f"{text}: {rule}", remedy)
        else:
            yield Finding("interface", host, OK, text if several else text.replace("none,", "loopback,"))


def own_addresses(case: DoctorContext) -> dict[str, str]:
    """By host, the address that its ranks listen at."""
    pythons = dict(case.each(Python))
    found: dict[str, str] = {}
    for host, network in case.each(NetworkAnswer):
        given = pythons[host].environment.get(IFNAME) if host in pythons else None
        one = network.interfaces.get(given.split(",")[0]) if given else None
        address = (one.address if one else None) if given else network.own
        if address is None and not given and len(case.hosts) == 1:
            address = "127.0.0.1"  # gloo's last resort
        if address is not None and is_address(address):
            found[host] = address
    return found


def is_address(text: str) -> bool:
    """Whether it is an IP address, not a name."""
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


def names(case: DoctorContext, master: str | None) -> Iterator[Finding]:
    """All hosts find the first one by its name, and not themselves."""
    if len(case.hosts) < 2:
        return
    first = case.names[0].rpartition("@")[2]
    wanted = [first, *([master] if master and master != first else [])]
    for host, network in case.each(NetworkAnswer):
        for name in wanted:
            addresses, needed = network.names.get(name, []), name == master
            verdict = FAIL if needed else WARNING
            remedy = f"Write {name} with its address into /etc/hosts there, or into the name server."
            if not addresses:
                yield Finding("names", host, verdict, f"{name} is not known", remedy)
            elif host != case.names[0] and _is_loopback(addresses):
                text = f"{name} is {addresses[0]}, which is that host itself"
                yield Finding("names", host, verdict, text, remedy)
            elif not is_address(name):
                listed = ", ".join(sorted(addresses)[:2])
                same = host == case.names[0] and _is_loopback(addresses)
                yield Finding("names", host, OK, f"{name} is {'itself' if same else listed}")


def meeting_place(case: DoctorContext, master: str | None) -> Iterator[Finding]:
    """The address that all ranks meet at is the first host's, and of no other: Docker's bridge is the same on all."""
    found = {name: {one.address for one in net.interfaces.values()} for name, net in case.each(NetworkAnswer)}
    first = case.names[0]
    if master is None or len(case.hosts) < 2 or first not in found:
        return
    addresses = (
        dict(case.each(NetworkAnswer))[first].names.get(master, []) if not is_address(master) else [master]
    )
    others = [name for name in found if name != first and found[name] & set(addresses)]
    taken = set(addresses).union(*(found[name] for name in others))
    own = ", ".join(sorted(a for a in found[first] if a and a not in taken and not _is_loopback([a])))
    text = f"ranks meet at {master}, port {case.options.master_port}"
    remedy = f"Give the launcher and this command --master_addr with another of its addresses: {own}."
    if not own:
        remedy = f"Give {first} an address of its own; where both names are of one machine, leave one out of the hostfile."
    if others:
        yield Finding("master", "", FAIL, f"{text}, which is an address of {', '.join(others)}", remedy)
    elif not found[first] & set(addresses):
        yield Finding("master", "", WARNING, f"{text}, which is no address of {first}'s interfaces", remedy)
    else:
        yield Finding("master", "", OK, text)


def _is_loopback(addresses: Sequence[str]) -> bool:
    return all(is_address(one) and ipaddress.ip_address(one).is_loopback for one in addresses)


def port(case: DoctorContext) -> Iterator[Finding]:
    """The first rank must be able to listen at the master port."""
    for host, found in case.each(Port):
        number = case.options.master_port
        if found.fault:
            by = f" by {found.holder}" if found.holder else ""
            text = f"{number}: {found.fault}{f', taken{by}' if by else ''}"
            remedy = "End what holds it (a run before?), or give the launcher and this command another --master_port."
            yield Finding("port", host, FAIL, text, remedy)
        else:
            yield Finding("port", host, OK, f"{number} is free on the first host")


class Rank(NamedTuple):
    """A rank of the network's probe."""

    host: str
    key: str  # of its reply


def links(case: DoctorContext, ranks: Sequence[Rank], replies: Mapping[str, Reply]) -> Iterator[Finding]:
    """What the network's probe found: who cannot be reached, whether runs have one folder, slow links."""
    results = {i: replies[rank.key].get(Result) for i, rank in enumerate(ranks)}
    silent = [i for i, result in results.items() if result is None]
    unreached = [(i, to) for i, result in results.items() if result for to in result.unreached]
    for i, to in unreached:
        if to < len(ranks):
            text = f"cannot connect to the ranks of {ranks[to].host}"
            remedy = f"Open all ports between the hosts, or name the network that they share in {IFNAME}."
            yield Finding("link", ranks[i].host, FAIL, text, remedy)
    yield from _runs_folder(case, ranks, results)
    faulty = {i: result for i, result in results.items() if result and result.fault and not result.unreached}
    if not unreached:
        for i in silent:
            text = f"the network's probe gave no result: {replies[ranks[i].key].fault or 'it was ended'}"
            yield Finding("link", ranks[i].host, FAIL, text, "See whether torch and gloo work there.")
        for i, result in faulty.items():
            remedy = (
                "See firewalls, --master_addr and the interface." if result.fault == "meet" else MEND_FIRST
            )
            what = {"meet": "no rendezvous at the first host", "measure": "gloo fails"}.get(result.fault)
            yield Finding("link", ranks[i].host, FAIL, f"{what or result.fault}: {result.text}", remedy)
    measured = [
        (i, link) for i, result in results.items() if result for link in result.links if link.to < len(ranks)
    ]
    if measured:
        yield from _speeds(case, ranks, measured)


def _runs_folder(
    case: DoctorContext, ranks: Sequence[Rank], results: Mapping[int, Result | None]
) -> Iterator[Finding]:
    """Ranks of all hosts write into one checkpoint."""
    if len({rank.host for rank in ranks}) < 2:
        return
    for i, result in results.items():
        if result and result.sees_token is not None and ranks[i].host != ranks[0].host:
            folder = case.options.project
            if result.sees_token:
                yield Finding("project", "", OK, f"{folder} is one folder for all hosts")
            else:
                text = f"{folder} there is another folder than on {ranks[0].host}, and no checkpoint could be written"
                remedy = "Name a folder on a disk that all hosts mount by --project."
                yield Finding("project", ranks[i].host, FAIL, text, remedy)


def _speeds(
    case: DoctorContext, ranks: Sequence[Rank], measured: Sequence[tuple[int, LinkAnswer]]
) -> Iterator[Finding]:
    usual = statistics.median(link.bytes_per_s for _, link in measured)
    for i, link in measured:
        source, target = ranks[i].host, ranks[link.to].host
        where = f"two ranks on {source}" if source == target else f"{source} to {target}"
        if len(case.hosts) == 1:
            where = "two ranks on this machine"
        text = f"{where}: {link.bytes_per_s / 1e6:.0f} MB/s, {link.latency_s * 1e6:.0f} us, over gloo"
        text += _step_cost(case, link) if source != target else ""
        uneven = len(case.hosts) > 2 and link.bytes_per_s < UNEVEN * usual
        if source != target and (link.bytes_per_s < SLOW or uneven):
            rule = f"the others have {usual / 1e6:.0f} MB/s" if uneven else f"less than {SLOW / 1e6:.0f} MB/s"
            remedy = f"Look at cable, switch and {IFNAME}; zero3 sends half as much again, a pipeline least."
            yield Finding("link", "", WARNING, f"{text}: {rule}", remedy)
        else:
            yield Finding("link", "", OK, text)


def _step_cost(case: DoctorContext, link: LinkAnswer) -> str:
    """Seconds that a ring of all hosts takes to sum the gradients of a step, none of it hidden."""
    if case.num_parameters is None:
        return ""
    hosts = len(case.hosts)
    seconds = 2 * (hosts - 1) / hosts * 4 * case.num_parameters / max(link.bytes_per_s, 1.0)
    return f"; {case.options.model}'s gradients take {seconds:.2g} s a step"
