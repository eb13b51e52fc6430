"""What a strategy needs and how long a step takes, from counts and stated figures.

Exact, as a run counts and measures them itself: parameters, gradients, optimizer, EMA, buckets (account.py) and what
autograd saves (models/activation_memory.py). Modelled: the loss, images on their way, and an allowance for workspaces. The time of
a step is a model: see `step_time`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.config import DeepSpeedConfig, check
from dsyolo.config.spec import Precision
from dsyolo.engine.memory_terms import MemoryEstimate
from dsyolo.engine.optimizer import parameter_groups
from dsyolo.models.activation_memory import ActivationPlan
from dsyolo.models.flops import BACKWARD
from dsyolo.models.partition import ACCELERATOR, balanced_cuts, boundary_elements
from dsyolo.models.stage import PipelineStage as Slice
from dsyolo.planner.comm_volume import boundary_bytes, comm_bytes, num_messages
from dsyolo.planner.hardware import HOST_BYTES_S, REACHED_BANDWIDTH, Hardware
from dsyolo.planner.memory_estimate import RankLoad, predict
from dsyolo.planner.model_profile import ModelProfile, StageProfile
from dsyolo.planner.strategy import StrategySettings

WORKSPACE_BYTES = (
    64 * 2**20
)  # of cuDNN and cuBLAS, beside everything else; the published peaks leave room for it
IMAGES_AHEAD = 2  # micro-batches of uint8 images on the device
HOST_STEP_BYTES_S = 20e9  # what an optimizer on the host reads and writes a second; an assumption
LATENCY_S, LATENCY_BETWEEN_S = 20e-6, 50e-6  # of a collective inside a node and between nodes; assumptions
LAUNCH_S = 5e-6  # that the host takes to start a kernel; an assumption
PARAMETERS_OF_CONV = 3  # its weight, and BatchNorm's two
KERNELS = 4  # of a convolution with its BatchNorm, activation and casts in a forward pass


class Times(NamedTuple):
    """Seconds of a step."""

    compute: float
    communication: float  # that nothing hides
    bubble: float  # stages of a pipeline that wait, for each other and for what crosses
    offload: float  # to the host, its optimizer, and back

    @property
    def step(self) -> float:
        return sum(self)


class StrategyEstimate(NamedTuple):
    """What one choice of settings comes to.

    Attributes:
        terms: bytes of the GPU that needs most, by name; their sum is its peak.
        host_bytes: of each node.
        val_images: the most images that can be validated at a time.
        wire: bytes that a GPU sends in a step, and receives.
    """

    settings: StrategySettings
    terms: dict[str, int]
    host_bytes: int
    val_images: int
    wire: int
    times: Times
    images_s: float
    why_not: str  # empty: it fits
    ds: DeepSpeedConfig

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return not self.why_not


class Planner:
    """Predicts strategies of one network on one kind of machine.

    Args:
        ema: keep averaged weights.
    """

    def __init__(self, work: ModelProfile, hardware: Hardware, *, ema: bool = True) -> None:
        self.work, self.hardware, self.ema = work, hardware, ema
        self._plans: dict[tuple[Precision, int, str | int], ActivationPlan] = {}
        self._stages: dict[int, list[StageProfile]] = {}

    def predict(self, settings: StrategySettings, ds: DeepSpeedConfig | None = None) -> StrategyEstimate:
        """Of settings that `check` accepts.

        Args:
            ds: the checked configuration, where there is one already.

        Raises:
            UserError: they cannot run.
        """
        work, hardware = self.work, self.hardware
        ds = ds or check(
            settings.deepspeed_json(),
            world_size=hardware.ranks,
            accelerator=hardware.accelerator,
            layers=work.layers,
        )
        is_cpu = hardware.accelerator == "cpu"
        zero = ds.deepspeed_json(work.num_parameters, cpu=is_cpu)["zero_optimization"]
        stages, plan = self.stages(settings.pipeline_stages), self._plan(settings)
        needs = [
            (self._terms(account, settings, i), account.host.total)
            for i, stage in enumerate(stages)
            for account in self._accounts(stage, i, plan, ds, zero)
        ]
        terms = max((terms for terms, _ in needs), key=lambda terms: sum(terms.values()))
        host_bytes = hardware.gpus * max(host for _, host in needs)
        val_images = self._val_images(settings, terms)
        times, wire = self._times(settings, ds, zero, stages, plan)
        return StrategyEstimate(
            settings,
            terms,
            host_bytes,
            val_images,
            wire,
            times,
            settings.global_batch / times.step,
            self._why_not(settings, terms, host_bytes)
            or ("" if val_images else "no room to validate an image"),
            ds,
        )

    def smallest_recompute(self, settings: StrategySettings, free_bytes: int) -> StrategySettings | None:
        """The fewest blocks whose recomputation leaves the activations within `free_bytes`; None: not even all do."""
        found = settings._replace(recompute=free_bytes)
        plan = self._plan(found)
        return found if plan.checkpointed and plan.peak_bytes <= free_bytes else None

    def stages(self, num: int) -> list[StageProfile]:
        """The network in so many stages, cut as a run cuts it."""
        if num not in self._stages:
            costs, network = self.work.costs, self.work.network
            bounds = [0, *balanced_cuts(costs, num, ACCELERATOR), len(costs)]
            self._stages[num] = [
                StageProfile(
                    tuple(network.order[start:stop]),
                    tuple(
                        tuple(p.numel() for p in group)
                        for group in parameter_groups(Slice(network, start, stop, ())).values()
                        if group
                    ),
                    sum(cost.flops for cost in costs[start:stop]),
                    sum(cost.elements for cost in costs[start:stop]),
                    boundary_elements(costs, stop) if stop < len(costs) else 0,
                )
                for start, stop in pairwise(bounds)
            ]
        return self._stages[num]

    def _plan(self, settings: StrategySettings) -> ActivationPlan:
        key = settings.precision, settings.micro_batch, settings.recompute
        if key not in self._plans:
            counted = self.work.activations(settings.micro_batch, settings.precision)
            recomputed = frozenset() if settings.recompute == "none" else counted.blocks
            if isinstance(settings.recompute, int):
                fewest = counted.fewest(settings.recompute)
                recomputed = counted.blocks if fewest is None else fewest
            self._plans[key] = ActivationPlan(counted, recomputed)
        return self._plans[key]

    def _accounts(
        self, stage: StageProfile, index: int, plan: ActivationPlan, ds: DeepSpeedConfig, zero: dict[str, Any]
    ) -> list[MemoryEstimate]:
        """Of some ranks of a stage: shares differ by little, and most at the ends and in the middle."""
        in_flight = min(ds.stages - index, ds.accumulation)
        kept = plan.stage_bytes(stage.nodes, in_flight)
        ranks = ds.dp_size
        some = (
            sorted({0, ranks // 3, ranks // 2, ranks - 1})
            if ds.zero_stage == 2 and ds.parallelism.offload.optimizer
            else [0]
        )
        loads = [RankLoad(stage.groups, kept, kept, kept, rank, ranks, self.ema) for rank in some]
        accounts = [predict(load, ds, zero) for load in loads]
        is_cpu = self.hardware.accelerator == "cpu"  # which is its own host
        return [MemoryEstimate(account.together) for account in accounts] if is_cpu else accounts

    def _terms(self, account: MemoryEstimate, settings: StrategySettings, stage: int) -> dict[str, int]:
        images, is_last = settings.micro_batch, stage == settings.pipeline_stages - 1
        channels, height, width = self.work.image_shape
        return {
            **account.device._asdict(),
            "loss": self.work.loss_bytes(images, settings.precision) if is_last else 0,
            "images": IMAGES_AHEAD * images * channels * height * width if stage == 0 else 0,
            "workspace": WORKSPACE_BYTES,
        }

    def _val_images(self, settings: StrategySettings, terms: dict[str, int]) -> int:
        """Beside the states. At ZeRO 0 gradients stay meanwhile, at ZeRO 3 weights are gathered, in a pipeline each rank gets the whole network."""
        stays = ["parameters", "optimizer", "ema", "workspace"]
        stays += {0: ["gradients"], 3: ["buckets"]}.get(settings.zero_stage, [])
        rest = sum(terms[name] for name in stays)
        if settings.pipeline_stages > 1:
            rest += 4 * self.work.num_parameters
        return self.work.most_inferred(self.hardware.usable_bytes - rest, settings.precision)

    def _why_not(self, settings: StrategySettings, terms: dict[str, int], host_bytes: int) -> str:
        budget, kept = settings.recompute, terms["activations"]
        if isinstance(budget, int) and kept > budget:
            return f"all blocks computed again leave {kept / 2**30:.2f} GiB of activations, of {budget / 2**30:.2f}"
        over = sum(terms.values()) - self.hardware.usable_bytes
        if over > 0:
            return f"too large by {over / 2**30:.2f} GiB"
        host = self.hardware.host_bytes
        if host is not None and host_bytes > host:
            return f"the host's memory is too small by {(host_bytes - host) / 2**30:.2f} GiB"
        return ""

    def _times(
        self,
        settings: StrategySettings,
        ds: DeepSpeedConfig,
        zero: dict[str, Any],
        stages: list[StageProfile],
        plan: ActivationPlan,
    ) -> tuple[Times, int]:
        """Seconds of a step, and bytes that a GPU sends in it.

        Gradients travel while the last micro-batch goes backward, weights while nothing else happens. A pipeline of stage
        times t with m micro-batches takes sum(t) + (m - 1) max(t) (Huang et al. 2019, arXiv:1811.06965).
        """
        hardware, dp_size, accumulation = self.hardware, settings.dp_size, settings.accumulation
        gradient_bytes = weight_bytes = settings.precision.params_bytes
        again = self._share_recomputed(plan)
        passes = [self._pass_s(settings, stage, 1 + BACKWARD + again) for stage in stages]
        each = settings.precision.compute_bytes
        borders = [boundary_bytes(stage.crossing, settings.micro_batch, each) for stage in stages]
        crossings = [2 * size / hardware.border_bytes_s(i, dp_size) for i, size in enumerate(borders)]
        stage_s = [a + b for a, b in zip(passes, crossings, strict=True)]
        whole = sum(stage_s) + (accumulation - 1) * max(stage_s)
        busy = accumulation * sum(passes) / len(passes)
        numels = (
            [self.work.numels] if len(stages) == 1 else [[n for g in s.groups for n in g] for s in stages]
        )
        sizes = {"gradient_bytes": gradient_bytes, "weight_bytes": weight_bytes}
        wires = [comm_bytes(zero, own, dp_size, accumulation, **sizes) for own in numels]
        firsts = range(0, len(stages) * dp_size, dp_size)
        link = min(hardware.ring_bytes_s(first, dp_size) for first in firsts)
        elements = max(map(sum, numels))
        reduced = (dp_size - 1) / dp_size * elements * gradient_bytes / link
        hidden = passes[0] * BACKWARD / (1 + BACKWARD + again) if len(stages) == 1 else 0.0
        communication = max(wires) / link - min(reduced, hidden)
        if dp_size > 1:
            is_inside = all(hardware.is_on_one_node(first, dp_size) for first in firsts)
            messages = max(num_messages(zero, own, accumulation) for own in numels)
            communication += (LATENCY_S if is_inside else LATENCY_BETWEEN_S) * messages
        offload = self._offload_s(settings, elements / dp_size, gradient_bytes, weight_bytes)
        # Activations go on, over a border that the last stage has not, and gradients to the stage before.
        crossed = [accumulation * (on + back) for on, back in zip(borders, [0, *borders], strict=False)]
        sent = max(map(sum, zip(wires, crossed, strict=True)))
        return Times(busy, communication, whole - busy, offload), int(sent)

    def _pass_s(self, settings: StrategySettings, stage: StageProfile, times: float) -> float:
        """Of a micro-batch through a stage: `times` its forward pass.

        That takes its operations at the reached rate and, beside them, its reads and writes at the reached bandwidth, but no
        less than the host takes to start its kernels; the backward pass twice as much; what is recomputed once more.
        """
        each = settings.precision.compute_bytes
        bandwidth = self.hardware.device.memory_bytes_s * REACHED_BANDWIDTH
        image_s = stage.flops / self.hardware.flops(settings.precision) + stage.elements * each / bandwidth
        launched = LAUNCH_S * KERNELS * sum(map(len, stage.groups)) / PARAMETERS_OF_CONV
        return max(settings.micro_batch * image_s, launched) * times

    def _offload_s(
        self, settings: StrategySettings, share: float, gradient_bytes: int, weight_bytes: int
    ) -> float:
        """Of `share` elements to the host, its optimizer, and back."""
        if not settings.offload_optimizer:
            return 0.0
        moved = share * (gradient_bytes + weight_bytes)
        if settings.offload_param:
            moved += 2 * settings.accumulation * share * weight_bytes
        return moved / HOST_BYTES_S + share * 4 * 6 / HOST_STEP_BYTES_S

    def _share_recomputed(self, plan: ActivationPlan) -> float:
        """Of the forward pass's work."""
        if not plan.checkpointed:
            return 0.0
        costs = self.work.costs
        return sum(c.flops for c in costs if c.name in plan.checkpointed) / self.work.flops
