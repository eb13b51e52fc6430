"""Check that the data set is usable on every host, and the same on all."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsyolo.doctor.answers import DataAnswer, Split
from dsyolo.doctor.ask import ask, probe_query
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding, split_problem

MAX_BUCKETS = 8  # buckets that a host is asked to list
MAX_NAMED = 3  # files in a finding


class _Difference(NamedTuple):
    """A split that differs on a host from the usual one, that of most hosts."""

    host: str
    usual: str
    split: str
    buckets: tuple[int, ...]  # all that differ


def data_set(context: DoctorContext) -> Iterator[Finding]:
    """Yield problems of data.yaml on each host, and what was compared where all is the same."""
    found = context.answers(DataAnswer)
    usable = {host: one for host, one in found.items() if not one.problems}
    path = context.options.data
    for host, one in found.items():
        for problem in one.problems:
            fault, remedy = split_problem(problem, f"Correct {path} or the labels.")
            fault = fault if str(path) in fault else f"{path}: {fault}"
            remedy = f"Make it the same as on {next(iter(usable))}." if usable else remedy
            yield Finding("data", host, FAIL, fault, remedy)
    if not usable:
        return
    for host, one in usable.items():
        for warning in one.warnings:
            fault, remedy = split_problem(warning, f"Check the labels of {path}.")
            yield Finding("data", host, WARNING, fault, remedy)
        for name, split in one.splits.items():
            for problem in split.problems:
                remedy = "Correct these rows or export them again. A training says the same, and goes on."
                yield Finding("data", host, WARNING, f"{name}: {problem}", remedy)
    digest, usual_host = common({host: one.digest for host, one in usable.items()})
    differ = {difference.host for difference in _differences(context)}
    for host, one in usable.items():
        if one.digest != digest:
            text = f"{path} differs from that on {usual_host}"
            yield Finding("data", host, FAIL, text, f"Copy it from {usual_host}.")
        elif host not in differ:
            same = "the same " if len(usable) > 1 else ""
            listed = "; ".join(f"{name}: {_covers(split)}" for name, split in one.splits.items())
            yield Finding("data", host, OK, f"{same}{listed}")


def _covers(split: Split) -> str:
    """Return the number of images, and what was compared of them."""
    part = {name: f" of one in {number}" if number > 1 else "" for name, number in split.one_in.items()}
    sizes, labels = part.get("sizes", ""), part.get("labels", "")
    rest = ""
    if split.num_unread:
        rest = f"; rows of {split.num_unread:,} labels are first checked by a training"
    return f"{split.num_images:,} images (names, sizes{sizes}, labels' content{labels}{rest})"


def _differences(context: DoctorContext) -> list[_Difference]:
    """Return where images or labels differ from those of most hosts."""
    found = {host: section.splits for host, section in context.answers(DataAnswer).items() if section.splits}
    result = []
    for split in sorted({name for one in found.values() for name in one}, reverse=True):
        sums = {host: tuple(one[split].buckets) for host, one in found.items() if split in one}
        most, usual = common(sums)
        for host, own in sums.items():
            odd = tuple(i for i, (a, b) in enumerate(zip(own, most, strict=False)) if a != b)
            if odd or len(own) != len(most):
                result.append(_Difference(host, usual, split, odd))
    return result


def differing_files(context: DoctorContext, requests: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Ask the hosts whose data sets differ for their files, and yield those that do. `requests`: the probe's, by host."""
    differences = _differences(context)
    wanted: dict[str, dict[str, list[int]]] = {}  # buckets to list, by host and split
    for one in differences:
        for host in (one.host, one.usual):
            buckets = wanted.setdefault(host, {}).setdefault(one.split, [])
            buckets += [bucket for bucket in one.buckets[:MAX_BUCKETS] if bucket not in buckets]
    queries = {
        host: probe_query(host, {**requests[host], "sections": ["data"], "buckets": buckets})
        for host, buckets in wanted.items()
    }
    replies = ask(queries, context.forwarded, context.options.timeout_s) if queries else {}
    listed = {host: (reply.get(DataAnswer) or DataAnswer()).listed for host, reply in replies.items()}
    for one in differences:
        own, usual = (listed[host].get(one.split, {}) for host in (one.host, one.usual))
        faults = []
        for path in sorted(own.keys() | usual.keys()):
            if path not in own:
                faults.append(f"{path} is missing")
            elif path not in usual:
                faults.append(f"{path} is not on {one.usual}")
            elif own[path] != usual[path]:
                faults.append(f"{path}: {own[path]}, but {usual[path]} on {one.usual}")
        text = "; ".join(faults[:MAX_NAMED]) or "files differ"
        more = max(len(faults), len(one.buckets)) - MAX_NAMED
        text += f"; and at least {more} more" if more > 0 else ""
        remedy = f"Copy the data set from {one.usual} again: rsync -a --checksum --delete."
        yield Finding("data", one.host, FAIL, f"{one.split}: {text}", remedy)
