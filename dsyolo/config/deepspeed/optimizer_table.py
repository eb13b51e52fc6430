"""The optimizers that a DeepSpeed JSON may ask for: the one table of their keys, defaults and states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsyolo.config.deepspeed.schema import BETAS, FLAG, Keys, Refused, number
from dsyolo.config.spec import OptimizerSpec

RECIPE_WEIGHT_DECAY = 0.0005  # what a plan and the value "auto" take, whatever the optimizer


@dataclass(frozen=True)
class OptimizerFacts:
    """Defaults, keys and states of one optimizer."""

    # Where the JSON gives none: SGD's are the recipe's (docs/yolov5.md), the others torch's.
    defaults: Mapping[str, Any]
    keys: Keys  # keys of `optimizer.params`
    states: int  # tensors that it keeps for each weight


_SGD_KEYS: Keys = {
    "lr": number(above=True),
    "momentum": number(below=1),
    "nesterov": FLAG,
    "weight_decay": number(),
}
_ADAM_KEYS: Keys = {
    "lr": number(above=True),
    "betas": BETAS,
    "eps": number(above=True),
    "weight_decay": number(),
    "adam_w_mode": FLAG,
    "torch_adam": Refused("torch's own optimizer is what runs here. Leave it out.", True),
    "bias_correction": Refused("Adam corrects its bias here, as torch's does. Leave it out.", True),
    "amsgrad": Refused("the optimizer keeps two states a weight, and AMSGrad needs three. Leave it out."),
}
_ADAM_DEFAULTS: Mapping[str, Any] = {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8}
OPTIMIZERS: Mapping[str, OptimizerFacts] = {
    "SGD": OptimizerFacts(
        {"lr": 0.01, "momentum": 0.937, "nesterov": True, "weight_decay": RECIPE_WEIGHT_DECAY},
        _SGD_KEYS,
        states=1,
    ),
    "Adam": OptimizerFacts({**_ADAM_DEFAULTS, "weight_decay": 0.0}, _ADAM_KEYS, states=2),
    "AdamW": OptimizerFacts({**_ADAM_DEFAULTS, "weight_decay": 0.01}, _ADAM_KEYS, states=2),
}


def optimizer_name(given: Any) -> str | None:
    """Return the name in the table: `adamw` is `AdamW`, as in DeepSpeed; None where there is no such optimizer."""
    known = {name.lower(): name for name in OPTIMIZERS}
    return known.get(given.lower()) if isinstance(given, str) else None


def optimizer_spec(name: str, params: Mapping[str, Any]) -> OptimizerSpec:
    """Return the optimizer with the defaults where `params` has none. SGD without momentum keeps no state."""
    facts = OPTIMIZERS[name]
    resolved = {**facts.defaults, **params}
    return OptimizerSpec(name, resolved, facts.states if resolved.get("momentum", 1) else 0)


def recipe_params(name: str) -> dict[str, Any]:
    """Return the parameters that a plan gives an optimizer."""
    return {**OPTIMIZERS[name].defaults, "weight_decay": RECIPE_WEIGHT_DECAY}
