"""Looks at all hosts and judges what came back: the order of things."""

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
from dsyolo.doctor.ask import Asked, Reply, ask, probing
from dsyolo.doctor.context import DoctorContext, DoctorOptions
from dsyolo.doctor.findings import FAIL, WARNING, Finding, in_order, joined
from dsyolo.doctor.gradients import gradients
from dsyolo.doctor.hosts import Crossing, Host, read_crossing, read_hostfile
from dsyolo.doctor.launcher import try_launcher
from dsyolo.models.registry import build_model, has_parameters, max_stride

LOCAL = "this machine"
NUM_CLASSES = 80  # of the model whose checkpoints are counted: a few hundred kilobytes more or less


def examine(options: DoctorOptions) -> tuple[list[Finding], list[str]]:
    """All findings in the order of the table, and the hosts."""
    remote = options.hostfile is not None
    hosts, findings = read_hostfile(options.hostfile) if options.hostfile else (_this_machine(options), [])
    if not hosts:
        return findings, []
    crossing = read_crossing() if remote else Crossing({}, ())
    findings += crossing.findings
    layers, num_parameters = _model(options.model)
    world_size = sum(host.slots for host in hosts)
    requests = _requests(options, hosts, world_size, layers)
    asked = {host.name: probing(host.name if remote else None, requests[host.name]) for host in hosts}
    with ThreadPoolExecutor(1) as pool:
        launcher = pool.submit(try_launcher, options, hosts) if remote else None
        replies = ask(asked, crossing, options.timeout_s)
        told, master = launcher.result() if launcher else ([], "127.0.0.1")
    source, ds = _json(options, world_size, replies)
    case = DoctorContext(options, hosts, crossing, replies, ds, num_parameters)
    findings += told
    findings += _judged(case, source, master)
    if differences := data_set.differences(case):
        findings += _second_look(case, requests, differences)
    if world_size > 1:
        findings += _network(case, findings, master)
    return joined(in_order(findings), case.names), case.names


def _this_machine(options: DoctorOptions) -> list[Host]:
    """As the launcher takes it: a rank for each GPU; on a CPU one, or as many as --num_gpus says."""
    is_cpu = all_variables().get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    return [Host(LOCAL, options.num_gpus or (1 if is_cpu else torch.cuda.device_count()))]


def _model(name: str | None) -> tuple[list[bool] | None, int | None]:
    """Of its layers whether they have parameters, and the number of these."""
    if name is None:
        return None, None
    with torch.device("meta"):
        network = build_model(name, NUM_CLASSES)
    return list(has_parameters(name)), sum(p.numel() for p in network.parameters())


def _requests(
    options: DoctorOptions, hosts: Sequence[Host], world_size: int, layers: list[bool] | None
) -> dict[str, dict[str, Any]]:
    """What each host is asked."""
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
    """The JSON, and what it comes to. What is wrong with it the hosts themselves tell."""
    if options.deepspeed_config is None:
        return {}, None
    source = read_source(options.deepspeed_config)
    found = next((one for reply in replies.values() if (one := reply.get(Devices))), None)
    accelerator = found.accelerator if found else "cuda"
    try:
        ds = check(source, world_size=world_size, accelerator=accelerator)
    except UserError:
        ds = None
    return dict(source.content or {}), ds


def _judged(case: DoctorContext, source: Mapping[str, Any], master: str | None) -> Iterator[Finding]:
    yield from _one_host_elsewhere(case)
    yield from network.reached(case)
    yield from software.python(case)
    yield from software.packages(case)
    yield from software.sources(case)
    yield from machine.slots(case)
    yield from software.deepspeed_json(case)
    yield from software.ops(case, source)
    yield from software.locks(case)
    yield from gradients(case)
    yield from data_set.data_set(case)
    yield from machine.disk(case)
    yield from machine.shared_memory(case)
    yield from machine.clock(case)
    yield from network.names(case, case.options.master_addr)
    yield from network.interfaces(case)
    yield from network.meeting_place(case, master)
    yield from network.port(case)


def _one_host_elsewhere(case: DoctorContext) -> Iterator[Finding]:
    """With a hostfile of one host the launcher goes nowhere: it starts that host's ranks on this machine."""
    if case.options.hostfile is None or len(case.hosts) > 1:
        return
    here = probe.identity()
    for host, hello in case.each(Hello):
        if (hello.machine, hello.network) != (here["machine"], here["network"]):
            text = f"{host} is the only host, and the launcher would start its ranks on this machine"
            remedy = f"Start it on {host}, or give the launcher --force_multi."
            yield Finding("hostfile", host, FAIL, text, remedy)


def _second_look(
    case: DoctorContext, requests: Mapping[str, Mapping[str, Any]], differences: list[data_set.Difference]
) -> Iterator[Finding]:
    """Asks the hosts whose data sets differ for the names of files."""
    remote = case.options.hostfile is not None
    asked = {
        host: probing(host if remote else None, {**requests[host], "sections": ["data"], "buckets": buckets})
        for host, buckets in data_set.wanted_buckets(differences).items()
    }
    yield from data_set.named(differences, ask(asked, case.crossing, case.options.timeout_s))


def _network(case: DoctorContext, findings: Sequence[Finding], master: str | None) -> Iterator[Finding]:
    """Lets ranks of all hosts talk, where nothing stands in the way that is known already."""
    needed = ("hostfile", "launcher", "ssh", "torch", "dsyolo", "interface", "master", "port", "names")
    failed = dict.fromkeys(f.check for f in findings if f.verdict == FAIL and f.check in needed)
    addresses = network.own_addresses(case)
    if failed or master is None or addresses.keys() != set(case.names):
        why = ", ".join(failed) or "some hosts' addresses"
        yield Finding("link", "", WARNING, f"not measured, because of {why}", network.MEND_FIRST)
        return
    # One rank on each host, and a second one on the first, where that will have several.
    places = [case.names[0]] * (2 if case.hosts[0].slots > 1 else 1) + case.names[1:]
    ranks = [network.Rank(host, f"{number} {host}") for number, host in enumerate(places)]
    token = f".dsyolo-{secrets.token_hex(8)}"
    asked = {}
    for number, rank in enumerate(ranks):
        request = {
            "rank": number,
            "size": len(ranks),
            "master": [master, case.options.master_port],
            "own": addresses[rank.host],
            "project": str(case.options.project),
            "token": token,
        }
        words = ["-m", "dsyolo.cluster.bandwidth", json.dumps(request)]
        asked[rank.key] = Asked(None if rank.host == LOCAL else rank.host, words, ["result"])
    yield from network.links(case, ranks, ask(asked, case.crossing, NETWORK_S))


NETWORK_S = 55  # more than the life of a rank of the network's probe


def check_options(options: DoctorOptions) -> None:
    """Mistakes of the command line. What it names and is not there is a finding instead.

    Raises:
        UserError: all of them.
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
