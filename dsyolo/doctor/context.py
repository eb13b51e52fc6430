"""The input of checks: the options, the hosts and their replies."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dsyolo.config.deepspeed.config import DeepSpeedConfig
from dsyolo.doctor.answers import Answer
from dsyolo.doctor.ask import Reply
from dsyolo.doctor.hosts import ForwardedEnvironment, Host

A = TypeVar("A", bound=Answer)
V = TypeVar("V", bound=Hashable)


class DoctorOptions(NamedTuple):
    """The command line of `dsyolo doctor`."""

    hostfile: Path | None
    deepspeed_config: Path | None
    data: Path | None
    model: str | None
    image_size_px: int
    project: Path
    num_gpus: int | None
    master_addr: str | None
    master_port: int
    workers: int | None
    timeout_s: float
    fix: bool


class DoctorContext(NamedTuple):
    """All that is known of the run."""

    options: DoctorOptions
    hosts: Sequence[Host]
    forwarded: ForwardedEnvironment
    replies: Mapping[str, Reply]
    source: Mapping[str, Any]  # content of the DeepSpeed JSON; empty without one
    ds: DeepSpeedConfig | None  # None without a JSON, or with one that is refused
    num_parameters: int | None  # the model's; None without --model
    master: str | None  # address of the ranks' rendezvous; None if it is not known

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.hosts]

    @property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts)

    def answers(self, kind: type[A]) -> dict[str, A]:
        """Return a section by the names of the hosts that answered it."""
        found = {name: reply.get(kind) for name, reply in self.replies.items()}
        return {name: section for name, section in found.items() if section is not None}


def common(values: Mapping[str, V]) -> tuple[V, str]:
    """Return the value that most hosts have, of equally frequent ones the first, and a host that has it."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, next(name for name, value in values.items() if value == usual)
