"""Findings of `dsyolo doctor`, as a table and as JSON: the check, the host, the verdict, what was found, the remedy."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dsyolo.base.text import escaped

OK, WARNING, FAIL = "OK", "WARNING", "FAIL"
WIDTH = 110
# The order of the table: first what the others rest on.
ORDER = (
    "hostfile environment launcher ssh probe python torch deepspeed dsyolo packages slots deepspeed_config ops locks "
    "gradients data disk shm clock names interface master port project link"
)


class Finding(NamedTuple):
    """One line of the table. An empty host means all of them, or none in particular."""

    check: str
    host: str
    verdict: str
    found: str
    remedy: str = ""


def merged(findings: Iterable[Finding], hosts: Sequence[str]) -> list[Finding]:
    """Sort findings by the table's order, and merge equal ones of several hosts; those of all hosts name none."""
    order = ORDER.split()
    of: dict[Finding, list[str]] = {}
    for finding in sorted(findings, key=lambda finding: order.index(finding.check)):
        of.setdefault(finding._replace(host=""), []).append(finding.host)
    lines: list[Finding] = []
    for finding, where in of.items():
        named = [host for host in where if host]
        everywhere = len(named) < len(where) or (len(hosts) > 1 and set(named) == set(hosts))
        more = f" and {len(named) - 3} more" if len(named) > 4 else ""
        listed = ", ".join(named[: 3 if more else 4]) + more
        lines.append(finding._replace(host="" if everywhere or len(hosts) == 1 else listed))
    return lines


def split_problem(problem: str, otherwise: str) -> tuple[str, str]:
    """Return (fault, remedy) of a problem line, in which the remedy follows the first sentence."""
    fault, *rest = re.split(r"(?<!\.)\. (?=[A-Z`])", problem.strip(), maxsplit=1)
    return (fault, rest[0]) if rest else (fault.removesuffix("."), otherwise)


def can_start(findings: Iterable[Finding]) -> bool:
    """Return whether nothing failed."""
    return all(finding.verdict != FAIL for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Return aligned lines, each remedy below its finding, and at the end whether the run can start."""
    findings = [
        Finding(*(escaped(text.replace("\n", " "), lines=False) for text in finding)) for finding in findings
    ]
    widths = [max(len(finding[i]) for finding in findings) for i in range(3)]
    lines: list[str] = []
    for finding in findings:
        columns = [f"{text:{width}}  " for text, width in zip(finding, widths, strict=False) if width]
        start = "".join(columns)
        lines += _wrapped(finding.found, start)
        if finding.remedy:
            lines += _wrapped(finding.remedy, " " * (len(start) - 3) + "-> ")
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in (FAIL, WARNING)}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    summary = f": {summary}" if summary else ""
    return "\n".join([*lines, "", f"The run can{'' if can_start(findings) else 'not'} start{summary}."])


def _wrapped(text: str, start: str) -> list[str]:
    wrapper = textwrap.TextWrapper(max(WIDTH, len(start) + 40), start, " " * len(start))
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text or "-")


def to_json(findings: Sequence[Finding], hosts: Sequence[str]) -> dict[str, Any]:
    """Return the findings in plain JSON types."""
    return {
        "can_start": can_start(findings),
        "hosts": list(hosts),
        "checks": [finding._asdict() for finding in findings],
    }
