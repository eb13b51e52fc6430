"""Run `dsyolo doctor`: query all hosts, check the replies, then test the network between them."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dsyolo.base.environment import all_variables
from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.config import DeepSpeedConfig, check
from dsyolo.config.deepspeed.json_reader import read_source
from dsyolo.doctor import dataset_checks, interconnect, probe, resources, software
from dsyolo.doctor.answers import Devices, Hello
from dsyolo.doctor.ask import Query, Reply, ask, probe_query
from dsyolo.doctor.context import DoctorContext, DoctorOptions
from dsyolo.doctor.findings import FAIL, WARNING, Finding, merged
from dsyolo.doctor.hosts import LOCAL, ForwardedEnvironment, Host, read_forwarded, read_hostfile
from dsyolo.models.registry import meta_network

NUM_CLASSES = 80  # for the size of checkpoints; another number changes it by some 100 KB
NETWORK_TEST_S = 55  # more than the lifetime of a rank of the test
# Without these the network test would only fail for the same reason.
NEEDED_BY_NETWORK = {"hostfile", "launcher", "ssh", "torch", "dsyolo", "interface", "master", "port", "names"}


def examine(options: DoctorOptions) -> tuple[list[Finding], list[str]]:
    """Return all findings in the order of the table, and the hosts."""
    remote = options.hostfile is not None
    hosts, findings = read_hostfile(options.hostfile) if options.hostfile else (_this_machine(options), [])
    if not hosts:
        return findings, []
    forwarded = read_forwarded() if remote else ForwardedEnvironment({}, ())
    layers, num_parameters = _model(options.model)
    world_size = sum(host.slots for host in hosts)
    requests = _requests(options, hosts, world_size, layers)
    queries = {name: probe_query(name, request) for name, request in requests.items()}
    with ThreadPoolExecutor(1) as pool:
        launcher = pool.submit(interconnect.check_launcher, options, hosts) if remote else None
        replies = ask(queries, forwarded, options.timeout_s)
        launcher_findings, master = launcher.result() if launcher else ([], "127.0.0.1")
    source, ds = _json(options, world_size, replies)
    context = DoctorContext(options, hosts, forwarded, replies, source, ds, num_parameters, master)
    findings += [*forwarded.findings, *launcher_findings, *_check_replies(context)]
    findings += dataset_checks.differing_files(context, requests)
    if world_size > 1:
        findings += _test_network(context, findings)
    return merged(findings, context.names), context.names


def _this_machine(options: DoctorOptions) -> list[Host]:
    """Return this machine with the launcher's slots: one per GPU, on a CPU one, unless --num_gpus is given."""
    is_cpu = all_variables().get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    return [Host(LOCAL, options.num_gpus or (1 if is_cpu else torch.cuda.device_count()))]


def _model(name: str | None) -> tuple[list[bool] | None, int | None]:
    """Return for each layer whether it has parameters, and the number of parameters."""
    if name is None:
        return None, None
    network = meta_network(name, NUM_CLASSES)
    return list(network.has_parameters), sum(p.numel() for p in network.parameters())


def _requests(
    options: DoctorOptions, hosts: Sequence[Host], world_size: int, layers: list[bool] | None
) -> dict[str, dict[str, Any]]:
    """Return the probe's request to each host."""
    sections = ["python", "devices", "packages", "sources", "disk", "locks", "network"]
    sections += ["deepspeed_json"] if options.deepspeed_config else []
    first = hosts[0].name
    master = [first.rpartition("@")[2], *filter(None, [options.master_addr])]
    request = {
        "packages": software.PACKAGES,
        "project": str(options.project),
        "fix": options.fix,
        "names": master if len(hosts) > 1 else [],
        "deepspeed_config": str(options.deepspeed_config),
        "world_size": world_size,
        "layers": layers,
        "data": str(options.data),
        "master_port": options.master_port,
    }
    data = ["data"] if options.data else []
    return {
        name: {**request, "sections": [*sections, *(["port"] if name == first else []), *data]}
        for name, _ in hosts
    }


def _json(
    options: DoctorOptions, world_size: int, replies: Mapping[str, Reply]
) -> tuple[Mapping[str, Any], DeepSpeedConfig | None]:
    """Return the JSON's content and its configuration, None if it is refused: the hosts report its faults."""
    if options.deepspeed_config is None:
        return {}, None
    source = read_source(options.deepspeed_config)
    devices = next((one for reply in replies.values() if (one := reply.get(Devices))), None)
    try:
        ds = check(source, world_size=world_size, accelerator=devices.accelerator if devices else "cuda")
    except UserError:
        ds = None
    return source.content or {}, ds


def _check_replies(context: DoctorContext) -> Iterator[Finding]:
    for check_of in (
        *(_single_remote_host, interconnect.reached, software.python, software.packages, software.sources),
        *(resources.slots, software.deepspeed_json, software.ops, software.locks, software.gradients),
        *(dataset_checks.data_set, resources.disk, resources.shared_memory, resources.clock),
        *(interconnect.names, interconnect.interfaces, interconnect.rendezvous_address, interconnect.port),
    ):
        yield from check_of(context)


def _single_remote_host(context: DoctorContext) -> Iterator[Finding]:
    """Check a hostfile of one host: the launcher would start its ranks on this machine."""
    if context.options.hostfile is None or len(context.hosts) > 1:
        return
    here = probe.identity()
    for host, hello in context.answers(Hello).items():
        if (hello.machine, hello.network) != (here["machine"], here["network"]):
            text = f"{host} is the only host, and the launcher would start its ranks on this machine"
            remedy = f"Start the launcher on {host}, or give it --force_multi."
            yield Finding("hostfile", host, FAIL, text, remedy)


def _test_network(context: DoctorContext, findings: Sequence[Finding]) -> Iterator[Finding]:
    """Measure links with ranks on all hosts, unless a known fault prevents it."""
    failed = dict.fromkeys(f.check for f in findings if f.verdict == FAIL and f.check in NEEDED_BY_NETWORK)
    addresses = interconnect.own_addresses(context)
    if failed or context.master is None or addresses.keys() != set(context.names):
        reason = ", ".join(failed) or "some hosts' addresses"
        text = f"not measured, because of {reason}"
        yield Finding("link", "", WARNING, text, interconnect.FIX_FIRST)
        return
    # One rank on each host, and a second on the first if that has several slots.
    ranks = [context.names[0]] * (2 if context.hosts[0].slots > 1 else 1) + context.names[1:]
    shared = {
        "size": len(ranks),
        "master": [context.master, context.options.master_port],
        "project": str(context.options.project),
        "token": f".dsyolo-{secrets.token_hex(8)}",
    }
    queries = {}
    for number, host in enumerate(ranks):
        request = json.dumps({**shared, "rank": number, "own": addresses[host]})
        queries[str(number)] = Query(host, ["-m", "dsyolo.cluster.bandwidth", request], ["result"])
    replies = ask(queries, context.forwarded, NETWORK_TEST_S)
    yield from interconnect.links(context, ranks, list(replies.values()))
