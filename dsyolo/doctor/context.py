"""What the judges see: the hosts, what was asked for, and what came back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from dsyolo.config.deepspeed.config import DeepSpeedConfig
from dsyolo.doctor.answers import Answer
from dsyolo.doctor.ask import Reply
from dsyolo.doctor.hosts import Crossing, Host

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
    """All that is known.

    Attributes:
        ds: None where there is no JSON, or one that is refused.
        num_parameters: of the model, None where it is not given.
    """

    options: DoctorOptions
    hosts: Sequence[Host]
    crossing: Crossing
    replies: Mapping[str, Reply]
    ds: DeepSpeedConfig | None
    num_parameters: int | None

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.hosts]

    @property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts)

    def slots(self, name: str) -> int:
        """Ranks of a host."""
        return next(host.slots for host in self.hosts if host.name == name)

    def each(self, kind: type[A]) -> Iterator[tuple[str, A]]:
        """The names of the hosts that have a section, with it."""
        for name, reply in self.replies.items():
            if (found := reply.get(kind)) is not None:
                yield name, found


def common(values: Mapping[str, V]) -> tuple[V, str]:
    """What most hosts have, the first ones where as many have another, and one of those hosts."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, next(name for name, value in values.items() if value == most)
