"""Run `dsyolo doctor`: query all hosts, check the replies, then test the network between them."""

from __future__ import annotations

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
from dsyolo.doctor import dataset_checks as data_set
from dsyolo.doctor import interconnect as network
from dsyolo.doctor import probe, software
from dsyolo.doctor import resources as machine
from dsyolo.doctor.answers import Devices, Hello
from dsyolo.doctor.ask import Query, Reply, ask, probe_query
from dsyolo.doctor.context import DoctorContext, DoctorOptions
from dsyolo.doctor.findings import FAIL, WARNING, Finding, in_order, merged
from dsyolo.doctor.gradients import gradients
from dsyolo.doctor.hosts import ForwardedEnvironment, Host, read_forwarded, read_hostfile
from dsyolo.doctor.launcher import check_launcher
from dsyolo.models.registry import build_model, has_parameters, max_stride

LOCAL = "this machine"
NUM_CLASSES = 80  # for the size of checkpoints; another number changes it by some 100 KB
NETWORK_TEST_S = 55  # more than the lifetime of a rank of the test


def examine(options: DoctorOptions) -> tuple[list[Finding], list[str]]:
    """Return all findings in the order of the table, and the hosts."""
    remote = options.hostfile is not None
    hosts, findings = read_hostfile(options.hostfile) if options.hostfile else (_this_machine(options), [])
    if not hosts:
        return findings, []
    forwarded = read_forwarded() if remote else ForwardedEnvironment({}, ())
    findings += forwarded.findings
    layers, num_parameters = _model(options.model)
    world_size = sum(host.slots for host in hosts)
    requests = _requests(options, hosts, world_size, layers)
    queries = {host.name: probe_query(host.name if remote else None, requests[host.name]) for host in hosts}
    with ThreadPoolExecutor(1) as pool:
        launcher = pool.submit(check_launcher, options, hosts) if remote else None
        replies = ask(queries, forwarded, options.timeout_s)
        launcher_findings, master = launcher.result() if launcher else ([], "127.0.0.1")
    source, ds = _json(options, world_size, replies)
    context = DoctorContext(options, hosts, forwarded, replies, ds, num_parameters)
    findings += launcher_findings
    findings += _check_replies(context, source, master)
    if differences := data_set.differences(context):
        findings += _list_differences(context, requests, differences)
    if world_size > 1:
        findings += _test_network(context, findings, master)
    return merged(in_order(findings), context.names), context.names


def _this_machine(options: DoctorOptions) -> list[Host]:
    """Return this machine with the launcher's slots: one per GPU, on a CPU one, unless --num_gpus is given."""
    is_cpu = all_variables().get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    return [Host(LOCAL, options.num_gpus or (1 if is_cpu else torch.cuda.device_count()))]


def _model(name: str | None) -> tuple[list[bool] | None, int | None]:
    """Return for each layer whether it has parameters, and the number of parameters."""
    if name is None:
        return None, None
    with torch.device("meta"):
        network = build_model(name, NUM_CLASSES)
    return list(has_parameters(name)), sum(p.numel() for p in network.parameters())


def _requests(
    options: DoctorOptions, hosts: Sequence[Host], world_size: int, layers: list[bool] | None
) -> dict[str, dict[str, Any]]:
    """Return the probe's request to each host."""
    sections = ["python", "devices", "packages", "sources", "compilers", "disk", "locks", "network"]
    sections += ["deepspeed_json"] if options.deepspeed_config else []
    first = hosts[0].name.rpartition("@")[2]
    request = {
        "packages": software.PACKAGES,
        "project": str(options.project),
        "fix": options.fix,
        "names": [] if len(hosts) < 2 else [first, *filter(None, [options.master_addr])],
        "deepspeed_config": str(options.deepspeed_config),
        "world_size": world_size,
        "layers": layers,
        "data": str(options.data),
        "master_port": options.master_port,
    }
    data = ["data"] if options.data else []
    return {
        host.name: {**request, "sections": [*sections, *(["port"] if number == 0 else []), *data]}
        for number, host in enumerate(hosts)
    }


def _json(
    options: DoctorOptions, world_size: int, replies: Mapping[str, Reply]
) -> tuple[dict[str, Any], DeepSpeedConfig | None]:
    """Return the JSON's content and its configuration, None if it is refused: the hosts report its faults."""
    if options.deepspeed_config is None:
        return {}, None
    source = read_source(options.deepspeed_config)
    devices = next((one for reply in replies.values() if (one := reply.get(Devices))), None)
    accelerator = devices.accelerator if devices else "cuda"
    try:
        ds = check(source, world_size=world_size, accelerator=accelerator)
    except UserError:
        ds = None
    return dict(source.content or {}), ds


def _check_replies(
    context: DoctorContext, source: Mapping[str, Any], master: str | None
) -> Iterator[Finding]:
    yield from _single_remote_host(context)
    yield from network.reached(context)
    yield from software.python(context)
    yield from software.packages(context)
    yield from software.sources(context)
    yield from machine.slots(context)
    yield from software.deepspeed_json(context)
    yield from software.ops(context, source)
    yield from software.locks(context)
    yield from gradients(context)
    yield from data_set.data_set(context)
    yield from machine.disk(context)
    yield from machine.shared_memory(context)
    yield from machine.clock(context)
    yield from network.names(context, context.options.master_addr)
    yield from network.interfaces(context)
    yield from network.rendezvous_address(context, master)
    yield from network.port(context)


def _single_remote_host(context: DoctorContext) -> Iterator[Finding]:
    """Check a hostfile of one host: the launcher would start its ranks on this machine."""
    if context.options.hostfile is None or len(context.hosts) > 1:
        return
    here = probe.identity()
    for host, hello in context.each(Hello):
        if (hello.machine, hello.network) != (here["machine"], here["network"]):
            text = f"{host} is the only host, and the launcher would start its ranks on this machine"
            remedy = f"Start the launcher on {host}, or give it --force_multi."
            yield Finding("hostfile", host, FAIL, text, remedy)


def _list_differences(
    context: DoctorContext, requests: Mapping[str, Mapping[str, Any]], differences: list[data_set.Difference]
) -> Iterator[Finding]:
    """Ask the hosts whose data sets differ for the names of files."""
    remote = context.options.hostfile is not None
    queries = {
        host: probe_query(
            host if remote else None, {**requests[host], "sections": ["data"], "buckets": buckets}
        )
        for host, buckets in data_set.wanted_buckets(differences).items()
    }
    replies = ask(queries, context.forwarded, context.options.timeout_s)
    yield from data_set.differing_files(differences, replies)


def _test_network(
    context: DoctorContext, findings: Sequence[Finding], master: str | None
) -> Iterator[Finding]:
    """Measure links with ranks on all hosts, unless a known fault prevents it."""
    needed = ("hostfile", "launcher", "ssh", "torch", "dsyolo", "interface", "master", "port", "names")
    failed = dict.fromkeys(f.check for f in findings if f.verdict == FAIL and f.check in needed)
    addresses = network.own_addresses(context)
    if failed or master is None or addresses.keys() != set(context.names):
        why = ", ".join(failed) or "some hosts' addresses"
        yield Finding("link", "", WARNING, f"not measured, because of {why}", network.FIX_FIRST)
        return
    # One rank on each host, and a second on the first if that has several slots.
    places = [context.names[0]] * (2 if context.hosts[0].slots > 1 else 1) + context.names[1:]
    ranks = [network.TestRank(host, f"{number} {host}") for number, host in enumerate(places)]
    token = f".dsyolo-{secrets.token_hex(8)}"
    queries = {}
    for number, rank in enumerate(ranks):
        request = {
            "rank": number,
            "size": len(ranks),
            "master": [master, context.options.master_port],
            "own": addresses[rank.host],
            "project": str(context.options.project),
            "token": token,
        }
        arguments = ["-m", "dsyolo.cluster.bandwidth", json.dumps(request)]
        queries[rank.key] = Query(None if rank.host == LOCAL else rank.host, arguments, ["result"])
    yield from network.links(context, ranks, ask(queries, context.forwarded, NETWORK_TEST_S))


def check_options(options: DoctorOptions) -> None:
    """Check the command line. Files that are missing are findings instead.

    Raises:
        UserError: with all mistakes.
    """
    problems = []
    if not 0 < options.master_port < 65536:
        problems.append(f"--master_port: {options.master_port} given, but ports are 1 to 65535.")
    if not 1 <= options.timeout_s <= 600:
        problems.append(f"--timeout: {options.timeout_s:g} given, but it must be 1 to 600 seconds.")
    stride = max_stride(options.model or "yolov5n")
    if options.image_size_px < stride or options.image_size_px % stride:
        problems.append(f"--imgsz: {options.image_size_px} given, but it must be a multiple of {stride}.")
    if options.num_gpus is not None and (options.num_gpus < 1 or options.hostfile):
        rule = "at least 1, and only without --hostfile, whose slots say how many"
        problems.append(f"--num_gpus: {options.num_gpus} given, but it must be {rule}.")
    if options.workers is not None and options.workers < 0:
        problems.append(f"--workers: {options.workers} given, but it must be at least 0.")
    if problems:
        raise UserError("The command line cannot be used", problems)
