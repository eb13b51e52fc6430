"""The optimizers that a DeepSpeed JSON may ask for: the one table of their keys, defaults and states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsyolo.config.deepspeed.schema import BETAS, FLAG, Keys, Refused, number
from dsyolo.config.messages import did_you_mean
from dsyolo.config.spec import OptimizerSpec

RECIPE_WEIGHT_DECAY = 0.0005  # SGD's where the JSON gives none, and what a plan writes for any optimizer
TORCH_ADAMW_WEIGHT_DECAY = 0.01  # torch.optim.AdamW's, which DeepSpeed takes where `torch_adam` is true


@dataclass(frozen=True)
class OptimizerFacts:
    """Defaults, keys and states of one optimizer."""

    # For what the JSON does not give, or leaves "auto": SGD's are the recipe's (docs/yolov5.md), those of Adam's kinds
    # are DeepSpeed's, whose FusedAdam and DeepSpeedCPUAdam do not decay.
    defaults: Mapping[str, Any]
    keys: Keys  # keys of `optimizer.params`
    states: int  # tensors that it keeps for each weight
    scales_weight_decay: bool  # by the global batch over 64, as the recipe


_SGD_KEYS: Keys = {
    "lr": number(above=True),
    "momentum": number(below=1),
    "nesterov": FLAG,
    "weight_decay": number(),
    "dampening": Refused("the recipe has none, and Nesterov excludes it. Leave it out.", 0),
}
_ADAM_KEYS: Keys = {
    "lr": number(above=True),
    "betas": BETAS,
    "eps": number(above=True),
    "weight_decay": number(),
    "adam_w_mode": FLAG,
    "bias_correction": Refused("Adam corrects its bias here. Leave it out.", True),
    "amsgrad": Refused("DeepSpeed's Adam has no AMSGrad. Leave it out."),
    "torch_adam": FLAG,  # the same arithmetic; but torch's class has a default of its own
    "set_grad_none": Refused("gradients are dropped after a step here. Leave it out.", True),
    "fp32_optimizer_states": Refused("checkpoints hold fp32 states. Leave it out.", True),
}
_ADAM_DEFAULTS: Mapping[str, Any] = {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
OPTIMIZERS: Mapping[str, OptimizerFacts] = {
    "SGD": OptimizerFacts(
        {"lr": 0.01, "momentum": 0.937, "nesterov": True, "weight_decay": RECIPE_WEIGHT_DECAY},
        _SGD_KEYS,
        states=1,
        scales_weight_decay=True,
    ),
    "Adam": OptimizerFacts(_ADAM_DEFAULTS, _ADAM_KEYS, states=2, scales_weight_decay=False),
    "AdamW": OptimizerFacts(_ADAM_DEFAULTS, _ADAM_KEYS, states=2, scales_weight_decay=False),
}


def optimizer_name(given: Any) -> str | None:
    """Return the name in the table: `adamw` is `AdamW`, as in DeepSpeed; None where there is no such optimizer."""
    known = {name.lower(): name for name in OPTIMIZERS}
    return known.get(given.lower()) if isinstance(given, str) else None


def nearest_optimizer(given: Any) -> str:
    """Return the remedy for an optimizer that dsyolo does not have: to leave it out would be another training."""
    name = given.lower().replace("_", "").replace("-", "") if isinstance(given, str) else ""
    if name in ("fusedadam", "cpuadam", "deepspeedcpuadam"):
        return 'Did you mean "Adam"?'
    if name in ("muon", "rmsprop") or "sgd" in name or "momentum" in name:
        return 'The nearest is "SGD" with momentum'
    if any(part in name for part in ("adam", "lamb", "lion", "adagrad", "onebit", "01", "adafactor")):
        return 'The nearest is "AdamW"'
    return did_you_mean(name, OPTIMIZERS) or "Write one of them"


def optimizer_spec(name: str, params: Mapping[str, Any]) -> OptimizerSpec:
    """Return the optimizer with the defaults where `params` has none. SGD without momentum keeps no state."""
    facts = OPTIMIZERS[name]
    resolved = {**facts.defaults, **params}
    if not resolved.get("momentum", 1):
        resolved["nesterov"] = params.get("nesterov", False)  # which needs momentum
    states = facts.states if resolved.get("momentum", 1) else 0
    return OptimizerSpec(name, resolved, states, facts.scales_weight_decay)


def recipe_params(name: str) -> dict[str, Any]:
    """Return the parameters that a plan gives an optimizer."""
    return {**OPTIMIZERS[name].defaults, "weight_decay": RECIPE_WEIGHT_DECAY}
