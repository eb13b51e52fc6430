"""A ranking as a table, as a recommendation and as JSON."""

from typing import Any

from dsyolo.config.run_config import RunConfig
from dsyolo.planner.hardware import GIB, Hardware
from dsyolo.planner.predict import StrategyEstimate
from dsyolo.planner.search import AS_FAST, HEADROOM, Ranking

CAVEATS = (
    "exact: parameters, gradients, optimizer, EMA and activations, counted by the same code as in a run.",
    "modelled: buckets (at their largest), loss, images, workspace (64 MiB), 0.6 GiB kept free for CUDA; six published "
    "peaks of YOLOv5 are met within 5 %.",
    "modelled: times. They order strategies, but may be off by a factor of two on your machine.",
)


def table(ranking: Ranking, most: int = 40) -> str:
    """Return a line for the best of each family."""
    shown = ranking.families()[:most]
    width = max([8, *(len(one.settings.describe()) for one in shown)])
    head = (
        f"{'':2}  {'strategy':{width}} {'precision':13} {'micro x acc x ranks':>19} {'peak GiB':>8} {'host GiB':>8} "
        f"{'sent GB':>7} {'step s':>7} {'images/s':>8} {'% of step *':>13}  fits"
    )
    lines = [head]
    for number, one in enumerate(shown, 1):
        s = one.settings
        sizes = f"{s.micro_batch} x {s.accumulation} x {s.dp_size}"
        lines.append(
            f"{number:2}  {s.describe():{width}} {s.precision.name:13} {sizes:>19} {one.peak_bytes / GIB:8.2f} "
            f"{one.host_bytes / GIB:8.1f} {one.comm_bytes / 1e9:7.2f} {one.times.step:7.3f} {one.images_s:8.0f} {shares(one):>13}  "
            f"{one.why_not or 'yes'}"
        )
    lines.append("* compute / communication / pipeline bubble / offload")
    return "\n".join(lines)


def shares(strategy: StrategyEstimate) -> str:
    """Return the shares of a step's time, in percent, in the order of `Times`."""
    return " / ".join(f"{100 * seconds / strategy.times.step:.0f}" for seconds in strategy.times)


def terms(strategy: StrategyEstimate) -> str:
    """Return the memory of the GPU that needs most, as a line."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in strategy.terms.items() if size)
    return f"peak {strategy.peak_bytes / GIB:.2f} GiB: {parts}"


def recommendation(ranking: Ranking, hardware: Hardware) -> str:
    """Return which strategy to take, and why the others lose."""
    best = ranking.best
    if best is None:
        return nothing_fits(ranking, hardware)
    s, free = best.settings, hardware.usable_bytes - best.peak_bytes
    split = best.times._asdict().items()
    share = [f"{name} {seconds / best.times.step:.0%}" for name, seconds in split if seconds]
    lines = [
        f"Take {s.describe()} in {s.precision.name}, micro-batch {s.micro_batch} x {s.accumulation} accumulation "
        f"x {s.dp_size} data-parallel: {best.images_s:.0f} images/s ({', '.join(share)}), {free / GIB:.1f} GiB free.",
        terms(best) + ".",
    ]
    if option := val_option(best):
        images = "1 image" if best.val_images == 1 else f"{best.val_images} images"
        lines.append(f"At most {images} can be validated at a time: give{option}.")
    lines += [f"  {one.settings.describe()}: {why(one, best)}" for one in ranking.families()[1:]]
    return "\n".join(lines)


def val_option(best: StrategyEstimate) -> str:
    """Return the option that makes validation fit; empty if it fits by default."""
    usual = RunConfig.model_fields["val_batch_size"].default
    return f" --val_batch_size {best.val_images}" if best.val_images < usual else ""


def why(one: StrategyEstimate, best: StrategyEstimate) -> str:
    """Return why `one` is not the best."""
    if not one.fits:
        return f"{one.why_not}, at {one.settings.micro_batch} images a GPU."
    slower = one.times.step / best.times.step - 1
    saved = (best.peak_bytes - one.peak_bytes) / GIB
    more = "" if saved >= 0 else f" more, with micro-batch {one.settings.micro_batch}"
    room = f"{'saves' if saved >= 0 else 'takes'} {abs(saved):.2f} GiB{more}"
    gaps = {name: getattr(one.times, name) - getattr(best.times, name) for name in one.times._fields}
    reason, gap = max(gaps.items(), key=lambda item: item[1])
    if slower < -AS_FAST:
        return f"{-slower:.0%} faster, but leaves less than {HEADROOM:.0%} of the memory free."
    if slower < AS_FAST or gap <= 0:
        return f"same speed; {room}{' that you do not need' if saved >= 0 else ''}."
    recomputes = one.settings.recompute != "none"
    bottlenecks = {
        "compute": "recomputation" if recomputes else f"computing in {one.settings.precision.name}",
        "communication": "communication",
        "bubble": "the pipeline bubble",
        "offload": "offload",
    }
    return f"{slower:.0%} slower, mostly because of {bottlenecks[reason]}; {room}."


def nothing_fits(ranking: Ranking, hardware: Hardware) -> str:
    """Return the strategy that is nearest to fitting, and what would help."""
    if not ranking.others:
        return f"No strategy exists for {hardware.ranks} GPUs: the global batch must be a multiple of them. Change --global-batch or --gpus."
    nearest = ranking.others[0]
    need = (nearest.peak_bytes + hardware.memory_bytes - hardware.usable_bytes) / GIB
    return (
        f"Nothing fits {hardware.ranks} GPU{'s' * (hardware.ranks > 1)} of {hardware.memory_bytes / GIB:.1f} GiB. The nearest is "
        f"{nearest.settings.describe()} in {nearest.settings.precision.name} with {nearest.settings.micro_batch} images a GPU: "
        f"{nearest.why_not}. {terms(nearest)}.\n"
        f"It would run with {need:.1f} GiB a GPU. Or use a smaller --imgsz or --model, or more GPUs."
    )


def to_json(ranking: Ranking) -> list[dict[str, Any]]:
    """Return all strategies: those that fit in the order of the ranking, then the others."""
    return [
        {
            "rank": number,
            "settings": {
                **one.settings._asdict(),
                "precision": one.settings.precision.name,
                "global_batch": one.settings.global_batch,
            },
            "peak_gpu_gib": one.peak_bytes / GIB,
            "terms_gib": {name: size / GIB for name, size in one.terms.items()},
            "host_gib": one.host_bytes / GIB,
            "val_images": one.val_images,
            "comm_bytes_per_step": one.comm_bytes,
            "step_s": {**one.times._asdict(), "step": one.times.step},
            "images_per_s": one.images_s,
            "fits": one.fits,
            "why_not": one.why_not,
            "deepspeed_config": one.settings.deepspeed_json(),
        }
        for number, one in enumerate((*ranking.fitting, *ranking.others), 1)
    ]
