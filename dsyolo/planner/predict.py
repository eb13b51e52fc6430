"""The memory that a strategy needs and the time of its step, from counts and stated figures.

Exact, by the code by which a run counts: parameters, gradients, optimizer, EMA, buckets (memory_estimate.py) and what
autograd saves (models/activation_memory.py). Modelled: the loss, images on their way, an allowance for workspaces, and
all times (`Planner._times`).
"""

from itertools import pairwise
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.config import DeepSpeedConfig, check
from dsyolo.config.spec import Precision
from dsyolo.engine.memory_profile import MemoryEstimate
from dsyolo.engine.optimizer import parameter_groups
from dsyolo.models.activation_memory import ActivationPlan
from dsyolo.models.flops import BACKWARD
from dsyolo.models.network import PipelineStage
from dsyolo.models.pipeline_cuts import ACCELERATOR, CPU, balanced_cuts, boundary_elements
from dsyolo.planner.comm_volume import comm_bytes, num_messages
from dsyolo.planner.hardware import HOST_BYTES_S, REACHED_BANDWIDTH, Hardware
from dsyolo.planner.memory_estimate import RankLoad, predict
from dsyolo.planner.model_profile import ModelProfile, StageProfile
from dsyolo.planner.strategy import StrategySettings

WORKSPACE_BYTES = 64 * 2**20  # workspace of cuDNN and cuBLAS; the published peaks leave room for it
IMAGES_AHEAD = 2  # micro-batches of uint8 images on the device
HOST_STEP_BYTES_S = 20e9  # what an optimizer on the host reads and writes a second; an assumption
LATENCY_S, LATENCY_BETWEEN_S = 20e-6, 50e-6  # a collective's inside a node, between nodes; assumptions
LAUNCH_S = 5e-6  # the host's time to start a kernel; an assumption
PARAMETERS_OF_CONV = 3  # its weight, and BatchNorm's two
KERNELS = 4  # kernels of a convolution, its BatchNorm, activation and casts in a forward pass


class Times(NamedTuple):
    """Seconds of a step."""

    compute: float
    communication: float  # the part that nothing hides
    bubble: float  # stages of a pipeline wait for each other and for boundary activations
    offload: float  # transfer to the host, its optimizer, and back

    @property
    def step(self) -> float:
        return sum(self)


class StrategyEstimate(NamedTuple):
    """The prediction for one strategy.

    Attributes:
        terms: bytes of the GPU that needs most, by name; their sum is its peak.
        host_bytes: of each node.
        val_images: the most images that can be validated at a time.
        comm_bytes: that a GPU sends in a step, and receives.
        why_not: why it does not fit; empty if it does.
    """

    settings: StrategySettings
    terms: dict[str, int]
    host_bytes: int
    val_images: int
    comm_bytes: int
    times: Times
    images_s: float
    why_not: str
    ds: DeepSpeedConfig

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return not self.why_not


class Planner:
    """Predicts strategies of one network, with averaged weights if `ema`, on one kind of machine."""

    def __init__(self, profile: ModelProfile, hardware: Hardware, *, ema: bool = True) -> None:
        self.profile, self.hardware, self.ema = profile, hardware, ema
        self._plans: dict[tuple[Precision, int, str | int], ActivationPlan] = {}
        self._stages: dict[tuple[int, str | tuple[int, ...]], list[StageProfile]] = {}

    def predict(self, settings: StrategySettings, ds: DeepSpeedConfig | None = None) -> StrategyEstimate:
        """Predict a strategy, or raise UserError if it cannot run; `ds` is its checked configuration, if there is one."""
        profile, hardware = self.profile, self.hardware
        is_cpu = hardware.accelerator == "cpu"
        ds = ds or check(
            settings.deepspeed_json(),
            world_size=hardware.ranks,
            accelerator=hardware.accelerator,
            layers=profile.layers,
        )
        zero = ds.deepspeed_json(profile.num_parameters, cpu=is_cpu)["zero_optimization"]
        stages = self.stages(settings.pipeline_stages, ds.parallelism.partition)
        plan = self._plan(settings)
        estimates = [
            (index, estimate)
            for index, stage in enumerate(stages)
            for estimate in self._estimates(stage, index, plan, ds, zero)
        ]
        each = [self._terms(estimate, settings, index) for index, estimate in estimates]
        terms = max(each, key=lambda terms: sum(terms.values()))
        host_bytes = hardware.gpus * max(estimate.host.total for _, estimate in estimates)
        val_images = self._val_images(settings, terms)
        times, sent = self._times(settings, zero, stages, plan)
        why_not = self._why_not(settings, terms, host_bytes)
        if not why_not and not val_images:
            why_not = "no room to validate an image"
        images_s = settings.global_batch / times.step
        return StrategyEstimate(settings, terms, host_bytes, val_images, sent, times, images_s, why_not, ds)

    def smallest_recompute(self, settings: StrategySettings, free_bytes: int) -> StrategySettings | None:
        """Return the settings with the fewest blocks recomputed to fit `free_bytes`; None: not even all suffice."""
        found = settings._replace(recompute=free_bytes)
        plan = self._plan(found)
        return found if plan.checkpointed and plan.peak_bytes <= free_bytes else None

    def stages(self, num: int, partition: str | tuple[int, ...] = "balanced") -> list[StageProfile]:
        """Return the network in `num` stages, cut as a run cuts it: where the JSON says, or balanced."""
        if (num, partition) not in self._stages:
            costs = self.profile.costs
            balance = CPU if self.hardware.accelerator == "cpu" else ACCELERATOR
            cuts = balanced_cuts(costs, num, balance) if isinstance(partition, str) else partition
            bounds = [0, *cuts, len(costs)]
            self._stages[num, partition] = [self._stage(start, stop) for start, stop in pairwise(bounds)]
        return self._stages[num, partition]

    def _stage(self, start: int, stop: int) -> StageProfile:
        costs, network = self.profile.costs, self.profile.network
        groups = parameter_groups(PipelineStage(network, start, stop, ())).values()
        return StageProfile(
            network.order[start:stop],
            tuple(tuple(p.numel() for p in group) for group in groups if group),
            sum(cost.flops for cost in costs[start:stop]),
            sum(cost.elements for cost in costs[start:stop]),
            boundary_elements(costs, stop) if stop < len(costs) else 0,
        )

    def _plan(self, settings: StrategySettings) -> ActivationPlan:
        key = settings.precision, settings.micro_batch, settings.recompute
        if key not in self._plans:
            counted = self.profile.activations(settings.micro_batch, settings.precision)
            names = frozenset[str]() if settings.recompute == "none" else counted.blocks
            if isinstance(settings.recompute, int):
                fewest = counted.fewest(settings.recompute)
                names = counted.blocks if fewest is None else fewest
            self._plans[key] = ActivationPlan(counted, names)
        return self._plans[key]

    def _estimates(
        self, stage: StageProfile, index: int, plan: ActivationPlan, ds: DeepSpeedConfig, zero: dict[str, Any]
    ) -> list[MemoryEstimate]:
        """Estimate some ranks of a stage: shares differ little, and most at the ends and in the middle."""
        in_flight = min(ds.stages - index, ds.accumulation)
        kept = plan.stage_bytes(stage.nodes, in_flight)
        dp_size, dp_ranks = ds.dp_size, {0}
        if ds.zero_stage == 2 and ds.parallelism.offload.optimizer:
            dp_ranks = {0, dp_size // 3, dp_size // 2, dp_size - 1}
        loads = [RankLoad(stage.groups, kept, kept, kept, one, dp_size, self.ema) for one in sorted(dp_ranks)]
        estimates = [predict(load, ds, zero) for load in loads]
        is_cpu = self.hardware.accelerator == "cpu"  # a CPU is its own host
        return [MemoryEstimate(one.combined) for one in estimates] if is_cpu else estimates

    def _terms(self, estimate: MemoryEstimate, settings: StrategySettings, stage: int) -> dict[str, int]:
        images, is_last = settings.micro_batch, stage == settings.pipeline_stages - 1
        image_bytes = 3 * self.profile.image_size_px**2
        return {
            **estimate.device._asdict(),
            "loss": self.profile.loss_bytes(images, settings.precision) if is_last else 0,
            "images": IMAGES_AHEAD * images * image_bytes if stage == 0 else 0,
            "workspace": WORKSPACE_BYTES,
        }

    def _val_images(self, settings: StrategySettings, terms: dict[str, int]) -> int:
        """Return how many images fit beside the states, at most.

        Meanwhile ZeRO 0 keeps gradients, ZeRO 3 gathers weights, and in a pipeline each rank gets the whole network.
        """
        stays = ["parameters", "optimizer", "ema", "workspace"]
        stays += {0: ["gradients"], 3: ["buckets"]}.get(settings.zero_stage, [])
        rest = sum(terms[name] for name in stays)
        if settings.pipeline_stages > 1:
            rest += 4 * self.profile.num_parameters
        return self.profile.most_inferred(self.hardware.usable_bytes - rest, settings.precision)

    def _why_not(self, settings: StrategySettings, terms: dict[str, int], host_bytes: int) -> str:
        budget, kept = settings.recompute, terms["activations"]
        if isinstance(budget, int) and kept > budget:
            return f"{kept / 2**30:.2f} GiB of activations even with all blocks recomputed, above the budget of {budget / 2**30:.2f} GiB"
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
        zero: dict[str, Any],
        stages: list[StageProfile],
        plan: ActivationPlan,
    ) -> tuple[Times, int]:
        """Return the seconds of a step, and the bytes that a GPU sends in it.

        Gradients travel during the backward pass of the last micro-batch, weights while nothing else happens. A pipeline
        of stage times t with m micro-batches takes sum(t) + (m - 1) max(t) (Huang et al. 2019, arXiv:1811.06965).
        """
        hardware, dp_size, accumulation = self.hardware, settings.dp_size, settings.accumulation
        number_bytes = settings.precision.params_bytes  # bytes of a gradient or weight that is sent
        recomputed = sum(cost.flops for cost in self.profile.costs if cost.name in plan.checkpointed)
        again = recomputed / self.profile.flops
        passes = [self._pass_s(settings, stage, 1 + BACKWARD + again) for stage in stages]
        image_bytes = settings.micro_batch * settings.precision.compute_bytes
        boundaries = [stage.boundary * image_bytes for stage in stages]
        stage_s = [
            pass_s + 2 * size / hardware.border_bytes_s(i, dp_size)
            for i, (pass_s, size) in enumerate(zip(passes, boundaries, strict=True))
        ]
        whole = sum(stage_s) + (accumulation - 1) * max(stage_s)
        busy = accumulation * sum(passes) / len(passes)
        numels = (
            [self.profile.numels] if len(stages) == 1 else [[n for g in s.groups for n in g] for s in stages]
        )
        volumes = [comm_bytes(zero, own, dp_size, accumulation, number_bytes) for own in numels]
        firsts = range(0, len(stages) * dp_size, dp_size)
        link = min(hardware.ring_bytes_s(first, dp_size) for first in firsts)
        elements = max(map(sum, numels))
        reduced = (dp_size - 1) / dp_size * elements * number_bytes / link
        hidden = passes[0] * BACKWARD / (1 + BACKWARD + again) if len(stages) == 1 else 0.0
        communication = max(volumes) / link - min(reduced, hidden)
        if dp_size > 1:
            is_inside = all(hardware.is_on_one_node(first, dp_size) for first in firsts)
            messages = max(num_messages(zero, own, accumulation) for own in numels)
            communication += (LATENCY_S if is_inside else LATENCY_BETWEEN_S) * messages
        offload = self._offload_s(settings, elements / dp_size, number_bytes)
        # Activations go to the next stage, which the last one has not, and their gradients to the previous one.
        handed = [accumulation * (on + back) for on, back in zip(boundaries, [0, *boundaries], strict=False)]
        sent = max(map(sum, zip(volumes, handed, strict=True)))
        return Times(busy, communication, whole - busy, offload), int(sent)

    def _pass_s(self, settings: StrategySettings, stage: StageProfile, times: float) -> float:
        """Return the seconds of a micro-batch in a stage: `times` its forward pass.

        That takes its FLOPs at the reached rate plus its reads and writes at the reached bandwidth, and at least the time
        in which the host starts its kernels.
        """
        each = settings.precision.compute_bytes
        bandwidth = self.hardware.device.memory_bytes_s * REACHED_BANDWIDTH
        image_s = stage.flops / self.hardware.flops(settings.precision) + stage.elements * each / bandwidth
        launched = LAUNCH_S * KERNELS * sum(map(len, stage.groups)) / PARAMETERS_OF_CONV
        return max(settings.micro_batch * image_s, launched) * times

    def _offload_s(self, settings: StrategySettings, share: float, number_bytes: int) -> float:
        """Return the seconds of `share` elements to the host, through its optimizer, and back."""
        if not settings.offload_optimizer:
            return 0.0
        moved = 2 * share * number_bytes
        if settings.offload_param:
            moved += 2 * settings.accumulation * share * number_bytes
        return moved / HOST_BYTES_S + share * 4 * 6 / HOST_STEP_BYTES_S
