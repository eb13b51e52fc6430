"""Judges the data set: usable on every host, and the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dsyolo.doctor.answers import DataAnswer, Split
from dsyolo.doctor.ask import Reply
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, Finding
from dsyolo.doctor.software import parted

MAX_BUCKETS = 8  # that a second look lists
MAX_NAMED = 3


class Difference(NamedTuple):
    """Of a host to another one, in a split."""

    host: str
    usual: str
    split: str
    buckets: tuple[int, ...]  # all that differ


def data_set(case: DoctorContext) -> Iterator[Finding]:
    """Problems of data.yaml on each host, and what the fingerprints cover where they are the same."""
    found = dict(case.each(DataAnswer))
    for host in case.names:
        section = case.replies[host].sections.get("data")
        if section is not None and section.error:
            yield Finding("data", host, FAIL, section.error, "See that dsyolo and the data are there.")
    usable = {host: one for host, one in found.items() if not one.problems}
    for host, one in found.items():
        for problem in one.problems:
            fault, remedy = parted(problem, "Correct it.")
            fault = fault if str(case.options.data) in fault else f"{case.options.data}: {fault}"
            remedy = f"Have it as on {next(iter(usable))}." if usable else remedy
            yield Finding("data", host, FAIL, fault, remedy)
    if not usable:
        return
    digest, there = common({host: one.digest for host, one in usable.items()})
    differ = {difference.host for difference in differences(case)}
    for host, one in usable.items():
        if one.digest != digest:
            text = f"{case.options.data} not as on {there}"
            yield Finding("data", host, FAIL, text, f"Copy it from {there}.")
        elif host not in differ:
            same = "the same " if len(usable) > 1 else ""
            listed = "; ".join(f"{name}: {_covers(split)}" for name, split in one.splits.items())
            yield Finding("data", host, OK, f"{same}{listed}")


def _covers(split: Split) -> str:
    """The number of images, and what of them was compared."""
    sizes, labels = split.one_in.get("sizes", 1), split.one_in.get("labels", 1)
    part = "" if sizes == 1 else f" of one in {sizes}"
    text = "" if labels == 1 else f" of one in {labels}"
    return f"{split.num_images:,} images (names, sizes{part}, labels' content{text})"


def differences(case: DoctorContext) -> list[Difference]:
    """Hosts whose images or labels are not those of most hosts."""
    found = {host: section.splits for host, section in case.each(DataAnswer) if section.splits}
    splits = sorted({name for one in found.values() for name in one}, reverse=True)
    result = []
    for split in splits:
        sums = {host: tuple(one[split].buckets) for host, one in found.items() if split in one}
        most, usual = common(sums)
        for host, own in sums.items():
            odd = tuple(i for i, (a, b) in enumerate(zip(own, most, strict=False)) if a != b)
            if odd or len(own) != len(most):
                result.append(Difference(host, usual, split, odd))
    return result


def wanted_buckets(differences: list[Difference]) -> dict[str, dict[str, list[int]]]:
    """By host and split, what a second look lists there: the buckets that differ, and the same on the usual host."""
    wanted: dict[str, dict[str, list[int]]] = {}
    for one in differences:
        for host in (one.host, one.usual):
            buckets = wanted.setdefault(host, {}).setdefault(one.split, [])
            buckets += [bucket for bucket in one.buckets[:MAX_BUCKETS] if bucket not in buckets]
    return wanted


def named(differences: list[Difference], replies: Mapping[str, Reply]) -> Iterator[Finding]:
    """The files that differ, from the second look."""
    for one in differences:
        own, usual = (_listed(replies, host, one.split) for host in (one.host, one.usual))
        faults = []
        for path in sorted(own.keys() | usual.keys()):
            if path not in own:
                faults.append(f"{path} is missing")
            elif path not in usual:
                faults.append(f"{path} is not on {one.usual}")
            elif own[path] != usual[path]:
                faults.append(f"{path}: {own[path]}, but {usual[path]} on {one.usual}")
        listed = "; ".join(faults[:MAX_NAMED]) or "files differ"
        more = max(len(faults), len(one.buckets)) - MAX_NAMED
        listed += f"; and at least {more} more" if more > 0 else ""
        remedy = f"Copy the data set from {one.usual} again: rsync -a --checksum --delete."
        yield Finding("data", one.host, FAIL, f"{one.split}: {listed}", remedy)


def _listed(replies: Mapping[str, Reply], host: str, split: str) -> Mapping[str, str]:
    section = replies[host].get(DataAnswer) if host in replies else None
    return section.listed.get(split, {}) if section else {}
