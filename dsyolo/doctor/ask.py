"""Query all hosts at once, each within a time limit. Only JSON lines of bounded size are read from an answer."""

import asyncio
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dsyolo.doctor import probe
from dsyolo.doctor.answers import ANSWERS, Answer, Hello
from dsyolo.doctor.hosts import LOCAL, NO_FOLDER, NO_PYTHON, ForwardedEnvironment, remote_command, ssh_command

A = TypeVar("A", bound=Answer)
MAX_LINE = 4 << 20  # bytes of a section; the largest, a listing of the data set, has some 100,000
SECTION_S = 30  # per section; importing torch from a network file system takes most of it
SECTION_LIMITS_S = {"data": 120}
NOT_VALID = (ValueError, RecursionError, AttributeError, TypeError)  # by the reading of what no probe wrote


@dataclass
class Reply:
    """The reply of a host."""

    sections: dict[str, Answer] = field(default_factory=dict)  # answers by section name
    fault: str = ""  # why it is incomplete
    remedy: str = ""
    status: int | None = None  # exit status of the command; None if it had to be stopped
    skew_s: float = 0.0  # least that its clock is ahead (negative: behind)

    def get(self, kind: type[A]) -> A | None:
        """Return the section of a kind; None if it is missing or an error."""
        section = next((one for one in self.sections.values() if type(one) is kind), None)
        return None if section is None or section.error else section


class Query(NamedTuple):
    """The source that Python runs on a host, and the sections that it must print."""

    host: str  # its name for ssh, or `LOCAL`
    arguments: Sequence[str]  # arguments of Python
    sections: Sequence[str]  # in the order of printing
    source: bytes = b""  # Python's standard input


def probe_query(host: str, request: Mapping[str, Any]) -> Query:
    """Return the query that runs the probe with a request."""
    sections = ["hello", *request["sections"]]
    return Query(host, ["-", json.dumps(request)], sections, Path(probe.__file__).read_bytes())


def ask(queries: Mapping[str, Query], forwarded: ForwardedEnvironment, timeout_s: float) -> dict[str, Reply]:
    """Run all queries at once; return the replies by the same keys."""

    async def gather() -> list[Reply]:
        return await asyncio.gather(*(_ask(query, forwarded, timeout_s) for query in queries.values()))

    return dict(zip(queries, asyncio.run(gather()), strict=True))


async def _ask(query: Query, forwarded: ForwardedEnvironment, timeout_s: float) -> Reply:
    command = [sys.executable, "-u", *query.arguments]
    if query.host != LOCAL:
        line = remote_command(sys.executable, forwarded, ["-u", *query.arguments])
        command = [*ssh_command(query.host, timeout_s), line]
    reply, begin, pipe = Reply(), time.time(), asyncio.subprocess.PIPE
    stdio: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "limit": MAX_LINE}
    try:
        # A new session has no terminal to ask for a password on.
        process = await asyncio.create_subprocess_exec(*command, **stdio, start_new_session=True)
    except OSError as error:
        reply.fault, reply.remedy = f"{command[0]}: {error.strerror}", f"Install {command[0]}."
        return reply
    errors = asyncio.create_task(_tail(process.stderr))
    try:
        await asyncio.wait_for(_send(process, query.source), timeout_s)
        await _read(reply, process, query.sections, begin, timeout_s)
        reply.status = await asyncio.wait_for(process.wait(), 5)
    except asyncio.TimeoutError:
        reply.fault = f"no answer within {timeout_s:g} s"
        reply.remedy = "Check that it is up and that ssh passes the firewall, or raise --timeout."
        if reply.sections:
            late = query.sections[min(len(reply.sections), len(query.sections) - 1)]
            reply.fault = f"no answer from the section {late!r}"
            reply.remedy = "Check its disks and its name server: one of them may hang."
    except NOT_VALID:
        reply.fault = "its answer is not valid"
        reply.remedy = "Check what Python and the login shell print there."
    finally:
        await _end(process, errors)
    if reply.status and not reply.fault:
        stderr = errors.result() if errors.done() else ""
        reply.fault, reply.remedy = _reason(reply.status, stderr, query, timeout_s)
    errors.cancel()
    return reply


async def _end(process: asyncio.subprocess.Process, errors: asyncio.Task[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    ended: asyncio.Future[Any] = asyncio.gather(process.wait(), _tail(process.stdout))
    rest: list[asyncio.Future[Any]] = [ended, errors]
    # With a limit: a master connection that ssh leaves behind keeps the pipes open.
    await asyncio.wait(rest, timeout=1)


async def _send(process: asyncio.subprocess.Process, source: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended; its exit status has the reason
        process.stdin.write(source)
        await process.stdin.drain()
    process.stdin.close()


async def _read(
    reply: Reply, process: asyncio.subprocess.Process, expected: Sequence[str], begin: float, timeout_s: float
) -> None:
    """Add sections as they arrive. Other output, as of a login shell, is skipped."""
    assert process.stdout is not None
    end = time.monotonic() + timeout_s
    while line := await asyncio.wait_for(process.stdout.readline(), max(0, end - time.monotonic())):
        if not line.startswith(b'{"section": '):
            continue
        content = json.loads(line)
        name = content.pop("section")
        if name != expected[len(reply.sections)]:
            raise ValueError(name)
        reply.sections[name] = section = ANSWERS[name].model_validate(content)
        if isinstance(section, Hello):
            # A bound whatever the delay: the host read its clock after `begin` and before now.
            reply.skew_s = max(0.0, section.time - time.time()) + min(0.0, section.time - begin)
        if len(reply.sections) == len(expected):
            return
        end = time.monotonic() + SECTION_LIMITS_S.get(expected[len(reply.sections)], SECTION_S)


def _reason(status: int, stderr: str, query: Query, timeout_s: float) -> tuple[str, str]:
    """Return (fault, remedy) of a command that failed."""
    if status == NO_FOLDER:
        remedy = "Create it: the launcher starts in the same folder on all hosts."
        return f"the folder {os.getcwd()} is missing", remedy
    if status == NO_PYTHON:
        remedy = "Install the environment at that path: the launcher uses the same interpreter on all hosts."
        return f"{sys.executable} is missing", remedy
    last = (stderr.strip().splitlines() or [f"status {status}"])[-1]
    if status != 255 or query.host == LOCAL:
        return f"Python ended with status {status}: {last}", "Repair the Python environment there."
    command = shlex.join([*ssh_command(query.host, timeout_s), "true"])
    if "verification failed" in stderr:
        scan = f"ssh-keyscan {query.host} >> ~/.ssh/known_hosts"
        return last, f"The host key of {query.host} is not known: connect once by hand, or run {scan}."
    if "ermission denied" in stderr:
        return last, f"ssh must work without a password: ssh-copy-id {query.host}. Test it with: {command}"
    return last, f"Make this command work without a prompt: {command}"


async def _tail(stream: asyncio.StreamReader | None, most: int = 4096) -> str:
    """Return the last bytes of a stream as text."""
    kept = b""
    while stream is not None and (chunk := await stream.read(4096)):
        kept = (kept + chunk)[-most:]
    return kept.decode(errors="replace")
