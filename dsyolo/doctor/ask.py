"""Asks all hosts at once, each for so long and not longer. An answer is JSON, of a bounded size, and nothing else."""

from __future__ import annotations

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
from dsyolo.doctor.hosts import NO_FOLDER, NO_PYTHON, Crossing, remote_command, ssh_command

A = TypeVar("A", bound=Answer)
MAX_LINE = 4 << 20  # bytes of a section; the largest, a listing of the data set, has some hundred thousand
SECTION_S = 30  # for a section; importing torch from a network's disk takes most of it
LIMITS_S = {"data": 120}


@dataclass
class Reply:
    """What came from a host.

    Attributes:
        sections: by name.
        fault, remedy: why there is not all of it; empty where there is.
        status: of the command; None where it had to be stopped.
        skew_s: so much its clock is ahead (negative: behind) at the least.
    """

    host: str
    sections: dict[str, Answer] = field(default_factory=dict)
    fault: str = ""
    remedy: str = ""
    status: int | None = None
    skew_s: float = 0.0

    def get(self, kind: type[A]) -> A | None:
        """The section of a kind, where the host found it."""
        found = next((one for one in self.sections.values() if type(one) is kind), None)
        return None if found is None or found.error else found


class Asked(NamedTuple):
    """What Python runs on a host, and what it is to print.

    Attributes:
        host: its name for ssh; None: this machine.
        words: Python's arguments.
        source: its standard input.
        sections: in their order.
    """

    host: str | None
    words: Sequence[str]
    sections: Sequence[str]
    source: bytes = b""


def probing(host: str | None, request: Mapping[str, Any]) -> Asked:
    """The probe's sections of a request."""
    words = ["-", json.dumps(request)]
    return Asked(host, words, ["hello", *request["sections"]], Path(probe.__file__).read_bytes())


def ask(asked: Mapping[str, Asked], crossing: Crossing, timeout_s: float) -> dict[str, Reply]:
    """A reply of each, by the same keys, in the time of the slowest."""

    async def gather() -> list[Reply]:
        return await asyncio.gather(*(_ask(key, one, crossing, timeout_s) for key, one in asked.items()))

    return {reply.host: reply for reply in asyncio.run(gather())}


async def _ask(key: str, asked: Asked, crossing: Crossing, timeout_s: float) -> Reply:
    command = [sys.executable, "-u", *asked.words]
    if asked.host is not None:
        line = remote_command(sys.executable, crossing, ["-u", *asked.words])
        command = [*ssh_command(asked.host, timeout_s), line]
    reply, begin = Reply(key), time.time()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            start_new_session=True,  # without a terminal to ask for a password on
        )
    except OSError as error:
        reply.fault, reply.remedy = f"{command[0]}: {error.strerror}", f"Install {command[0]}."
        return reply
    errors = asyncio.create_task(_tail(process.stderr))
    try:
        await asyncio.wait_for(_send(process, asked.source), timeout_s)
        await _read(reply, process, asked.sections, begin, timeout_s)
        reply.status = await asyncio.wait_for(process.wait(), 5)
    except asyncio.TimeoutError:
        _tell_silence(reply, asked.sections, timeout_s)
    except (ValueError, RecursionError, AttributeError, TypeError):
        reply.fault = "its answer cannot be understood"
        reply.remedy = "See what Python and the shell print there."
    finally:
        await _end(process, errors)
    if reply.status and not reply.fault:
        said = errors.result() if errors.done() else ""
        reply.fault, reply.remedy = _reason(reply, said, asked, timeout_s)
    errors.cancel()
    return reply


async def _end(process: asyncio.subprocess.Process, errors: asyncio.Task[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    rest = asyncio.gather(process.wait(), _tail(process.stdout))
    await asyncio.wait(
        [rest, errors], timeout=1
    )  # a master connection that ssh leaves behind keeps pipes open


async def _send(process: asyncio.subprocess.Process, source: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it ended already; its status says why
        process.stdin.write(source)
        await process.stdin.drain()
    process.stdin.close()


async def _read(
    reply: Reply,
    process: asyncio.subprocess.Process,
    expected: Sequence[str],
    begin: float,
    timeout_s: float,
) -> None:
    """Adds sections as they come. What a login shell prints before them is passed over, but costs time."""
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
            reply.skew_s = _skew(section, begin)
        if len(reply.sections) == len(expected):
            return
        end = time.monotonic() + LIMITS_S.get(expected[len(reply.sections)], SECTION_S)


def _skew(hello: Hello, begin: float) -> float:
    """Whatever the way took, the host read its clock after `begin` and before now."""
    return max(0.0, hello.time - time.time()) + min(0.0, hello.time - begin)


def _tell_silence(reply: Reply, expected: Sequence[str], timeout_s: float) -> None:
    if not reply.sections:
        reply.fault = f"no answer within {timeout_s:g} s"
        reply.remedy = "See whether it is up and a firewall lets ssh through, or give it longer by --timeout."
        return
    late = expected[min(len(reply.sections), len(expected) - 1)]
    reply.fault = f"it went silent in the section {late!r}"
    reply.remedy = "A disk or a name server that hangs does this: look at it there."


def _reason(reply: Reply, said: str, asked: Asked, timeout_s: float) -> tuple[str, str]:
    """(fault, remedy) of a command that failed."""
    if reply.status == NO_FOLDER:
        remedy = "The launcher starts in the same folder on all hosts: put it there."
        return f"the folder {os.path.abspath('.')} is not there", remedy
    if reply.status == NO_PYTHON:
        remedy = (
            "The launcher starts the same interpreter on all hosts: install the environment at that path."
        )
        return f"{sys.executable} is not there", remedy
    last = (said.strip().splitlines() or [f"status {reply.status}"])[-1]
    if reply.status != 255 or asked.host is None:
        return f"Python ended with status {reply.status}: {last}", "See to Python there."
    way = shlex.join([*ssh_command(asked.host, timeout_s), "true"])
    if "verification failed" in said:
        return last, f"Its key is not known here: connect once by hand, or use ssh-keyscan {asked.host}."
    if "ermission denied" in said:
        return last, f"ssh must work without a password: ssh-copy-id {asked.host}. Then this is silent: {way}"
    return last, f"Make this work without a question: {way}"


async def _tail(stream: asyncio.StreamReader | None, most: int = 4096) -> str:
    """The last bytes of what was said."""
    kept = b""
    while stream is not None and (chunk := await stream.read(4096)):
        kept = (kept + chunk)[-most:]
    return kept.decode(errors="replace")
