"""The loss scale of fp16: its state in checkpoints, and whether it made a step be skipped."""

from collections.abc import Mapping
from typing import Any

from dsyolo.engine import deepspeed_internals as internals


class LossScale:
    """The scaler of a DeepSpeed engine: its own (`fp16.enabled`), torch's (fp16 autocast at ZeRO 0), or none.

    Attributes:
        can_skip: there is a scaler; it skips a step whose gradients are not finite, and halves the scale.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._torch = internals.autocast_scaler(engine)
        self._own = internals.dynamic_scaler(engine)
        self.can_skip = self._torch is not None or engine.fp16_enabled()
        self._before = self._torch.get_scale() if self._torch else 0.0

    def step_was_applied(self) -> bool:
        """Whether the last step changed the weights. Waits for the device under fp16 autocast only."""
        if self._torch is None:
            return self._engine.was_step_applied()
        before, self._before = self._before, self._torch.get_scale()
        return self._before >= before

    def state(self) -> dict[str, float]:
        """Return scale, steps since its last change, and (DeepSpeed's) overflows until it falls; empty without a scaler."""
        if self._torch is not None:
            state = self._torch.state_dict()
            return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}
        return {} if self._own is None else internals.scaler_state(self._own)

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a `state` of either scaler. An empty one changes nothing, nor does any without a scaler here."""
        if state and self._torch is not None:
            settings = self._torch.state_dict()
            good_steps = int(state["good_steps"]) % settings["growth_interval"]
            self._torch.load_state_dict({**settings, "scale": state["scale"], "_growth_tracker": good_steps})
            self._before = self._torch.get_scale()
        elif state and self._own is not None:
            internals.load_scaler_state(self._own, state)
