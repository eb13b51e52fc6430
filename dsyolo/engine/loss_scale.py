"""The loss scale of fp16: what a checkpoint keeps of it, and whether a step was skipped because of it."""

from __future__ import annotations

from collections.abc import Mapping

from dsyolo.engine import deepspeed_internals as internals


class LossScale:
    """The scaler of a DeepSpeed engine: its own (`fp16.enabled`), torch's (fp16 autocast at ZeRO 0), or none.

    Args:
        engine: what `deepspeed.initialize` returned.

    Attributes:
        can_skip: there is one; a step whose gradients are not finite is left out, and the scale halved.
    """

    def __init__(self, engine) -> None:
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
        """Scale, steps since it last changed, and (DeepSpeed's) overflows until it falls. Empty: nothing moves."""
        if self._torch is not None:
            state = self._torch.state_dict()
            return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}
        return {} if self._own is None else internals.scaler_state(self._own)

    def load(self, state: Mapping[str, float]) -> None:
        """Goes on from what `state` gave, of either scaler; an empty one, or no scaler here, changes nothing."""
        if state and self._torch is not None:
            settings = self._torch.state_dict()
            good_steps = int(state["good_steps"]) % settings["growth_interval"]
            self._torch.load_state_dict({**settings, "scale": state["scale"], "_growth_tracker": good_steps})
            self._before = self._torch.get_scale()
        elif state and self._own is not None:
            internals.load_scaler_state(self._own, state)
