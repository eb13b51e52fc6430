"""Unknown keys of a DeepSpeed JSON: set aside where DeepSpeed ignores them too, refused where they look like a mistake."""

from collections.abc import Iterator, Mapping
from typing import Any

from dsyolo.config.deepspeed.optimizer_table import OPTIMIZERS
from dsyolo.config.deepspeed.scheduler_table import SCHEDULE_PARAMS
from dsyolo.config.deepspeed.schema import TOP_LEVEL
from dsyolo.config.deepspeed.set_aside import off_reason
from dsyolo.config.deepspeed.verdicts import Alias, JsonKey, JsonSection, Keys, Refused, SetAside
from dsyolo.config.messages import did_you_mean
from dsyolo.config.recipe import RECIPE_KEYS
from dsyolo.config.run_config import JSON_KNOBS, RUN_KEYS

MOST_PLACES = 3  # places of one key that a message names
# An unknown key that is so near to a known one, or begins it, is a mistake; others DeepSpeed ignores too.
TYPO, SHORTEST = 0.75, 4

_HALF, _BATCH = "torch_autocast.enabled", "train_micro_batch_size_per_gpu"
# Words of other libraries, and the places of what they mean.
FOREIGN_WORDS: Mapping[str, str] = {
    **dict.fromkeys(["learning_rate", "learningRate", "lr", "base_lr", "init_lr"], "optimizer.params.lr"),
    **dict.fromkeys(
        ["clip_grad", "grad_clip", "clip_grad_norm", "grad_norm_clip", "clipping"], "gradient_clipping"
    ),
    **dict.fromkeys(["mixed_precision", "precision", "use_amp", "autocast", "torch_amp", "half"], _HALF),
    "fp16_enabled": "fp16.enabled",
    "bf16_enabled": "bf16.enabled",
    **dict.fromkeys(
        ["warmup_steps", "warmup_ratio", "num_warmup_steps"], "scheduler.params.warmup_num_steps"
    ),
    **dict.fromkeys(["lr_scheduler_type", "lr_scheduler", "scheduler_type"], "scheduler.type"),
    "optimizer_type": "optimizer.type",
    "wd": "optimizer.params.weight_decay",
    **dict.fromkeys(
        ["grad_acc", "grad_accum", "accumulate_grad_batches", "grad_accum_steps"],
        "gradient_accumulation_steps",
    ),
    **dict.fromkeys(["pipeline_stages", "num_stages", "pipeline_parallel_size"], "pipeline.stages"),
    **dict.fromkeys(["offload", "offload_device"], "zero_optimization.offload_optimizer.device"),
    **dict.fromkeys(["per_device_train_batch_size", "micro_batch_size", "batch_size_per_gpu"], _BATCH),
    **dict.fromkeys(["gradient_checkpoint", "grad_checkpointing"], "activation_checkpointing.recompute"),
    **dict.fromkeys(["zero_stage", "stage"], "zero_optimization.stage"),
}
_OFF = (None, False, 0, "no", "none", "")
_TYPE_WORDS = ("name", "class", "kind")


def fault_of(name: str, value: Any, keys: Mapping[str, Any], prefix: str) -> str:
    """Return the fault of an unknown key: its exact place comes before a likely word."""
    if not prefix and (inner := _keys_of_the_top(value)):
        return f"unknown block, but {' and '.join(inner[:3])} in it belong{'s' * (len(inner) == 1)} to the top level. Move its keys there."
    owners = [owner for owner, facts in OPTIMIZERS.items() if name in facts.keys]
    if owners and prefix == "optimizer.params.":
        return f"it belongs to {' and '.join(owners)}. Leave it out, or set optimizer.type."
    if prefix in ("optimizer.", "scheduler.") and name.lower() in _TYPE_WORDS:
        return f"unknown key. Write {prefix}type."
    is_owned = not prefix and name in RUN_KEYS | RECIPE_KEYS
    owned = f"the run configuration owns it. Leave it out and give --{name}."
    if is_owned and name not in FOREIGN_WORDS:
        return owned
    if prefix == f"{name}.":
        return f"unknown key. Write {prefix}enabled."
    places = list(dict.fromkeys(path for path, _ in _places(name)))
    if not places and name in FOREIGN_WORDS:
        places = [FOREIGN_WORDS[name]]
    if not places and name in JSON_KNOBS:
        places = [JSON_KNOBS[name]]
    if 0 < len(places) <= MOST_PLACES:
        where = " or ".join(place if "." in place else f"{place}, at the top level" for place in places)
        return f"unknown key here. Its place is {where}."
    if is_owned:
        return owned
    usable = [known for known, key in keys.items() if isinstance(key, (JsonKey, JsonSection))]
    begun = [known for known in usable if len(name) >= SHORTEST and known.startswith(name.lower())]
    hint = f"Did you mean {begun[0]}?" if len(begun) == 1 else did_you_mean(name, usable)
    return f"unknown key. {hint or 'Leave it out.'}"


def why_set_aside(name: str, value: Any, keys: Keys, prefix: str, is_strict: bool) -> str | None:
    """Return why an unknown key is set aside, None where it is refused: what could be a mistake is."""
    places = list(_places(name))
    homes = [key for _, key in places]
    if homes and all(isinstance(key, (SetAside, Refused)) for key in homes):
        first = homes[0]
        return first.reason if isinstance(first, SetAside) else off_reason(first, value)
    if value is None:
        return "null, so its default holds"
    if name in FOREIGN_WORDS and not homes and not (isinstance(value, (str, int, float)) and value in _OFF):
        return None
    if not prefix and _keys_of_the_top(value):
        return None
    is_other = places or name in RUN_KEYS | RECIPE_KEYS or name in JSON_KNOBS
    is_short = len(name) >= SHORTEST and any(known.startswith(name.lower()) for known in keys)
    if is_strict or is_other or is_short or did_you_mean(name, keys, cutoff=TYPO):
        return None
    return "neither DeepSpeed nor dsyolo knows it"


def _keys_of_the_top(value: Any) -> list[str]:
    """Return the keys of a block that DeepSpeed has at the top level: those of a JSON inside another's."""
    own = {
        "optimizer",
        "scheduler",
        "pipeline",
        "compile",
        "checkpoint",
    }  # other libraries have these words too
    return [key for key in value if key in TOP_LEVEL and key not in own] if isinstance(value, dict) else []


def _places(name: str, keys: Keys = TOP_LEVEL, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the paths at which a key of this name has a place, and its verdict there."""
    key = keys.get(name)
    if isinstance(key, Alias):
        yield prefix + key.name, keys[key.name]
    elif key is not None:
        yield prefix + name, key
    for above, part in keys.items():
        if isinstance(part, JsonSection):
            yield from _places(name, part.keys, f"{prefix}{above}.")
    if not prefix:
        for facts in OPTIMIZERS.values():
            if name in facts.keys:
                yield f"optimizer.params.{name}", facts.keys[name]
        if name in SCHEDULE_PARAMS:
            yield f"scheduler.params.{name}", SCHEDULE_PARAMS[name]
