"""Checks that all ranks read the same files: each host has its own copies where the project's folder is not shared."""

from collections.abc import Iterator, Mapping
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.cluster import collectives
from dsyolo.cluster.world import World
from dsyolo.config.resolve import RunSpec

MAX_NAMED = 5


def check_same_settings(spec: RunSpec, world: World) -> None:
    """Raise UserError on all ranks, which all call it, if a rank trains with other settings than rank 0."""
    own = dict(_settings(spec))
    first = collectives.run_on_rank0_and_broadcast(world, lambda: own)
    names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
    lines = [
        f"{name}: {own.get(name)!r} on rank {world.rank}, and {first.get(name)!r} on rank 0. {_remedy(name, spec)}"
        for name in names[:MAX_NAMED]
    ]
    if len(names) > MAX_NAMED:
        lines.append(f"{len(names) - MAX_NAMED} more settings differ.")
    if problem := collectives.first_problem_of_any_rank("\n".join(lines) or None):
        raise UserError("The ranks do not agree", problem.split("\n"))


def _settings(spec: RunSpec) -> Iterator[tuple[str, Any]]:
    run = spec.config.dump()
    config, data, recipe, hyp = (run.pop(name) for name in ("deepspeed_config", "data", "recipe", "hyp"))
    yield from ((f"{key} of --deepspeed_config {config}", value) for key, value in _leaves(spec.ds.source))
    yield f"names of {data}", spec.data.names
    yield from ((f"{key} of --hyp {hyp}", value) for key, value in _leaves(recipe))
    yield from ((f"--{name}", value) for name, value in run.items() if not name.startswith("wandb"))


def _leaves(block: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{below}", one) for below, one in _leaves(value))
        else:
            yield key, value


def _remedy(name: str, spec: RunSpec) -> str:
    if spec.is_planned and name.endswith(" of --deepspeed_config auto"):
        return "Their machines differ: write one plan for all by dsyolo plan."
    return "Copy one file to all hosts, or keep it in a folder that they share."
