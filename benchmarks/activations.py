"""The bytes that autograd saves in a forward pass: counted on fake tensors beside what torch's CPU allocator kept.

    PYTHONPATH=benchmarks python benchmarks/activations.py --models yolov5n yolov5s yolov5m --sizes 320 640

Each allocation and release is an event of torch.profiler. What is left after a forward pass is what autograd saves and
the raw maps. Counted are the same, by the code that plans and that tells a run's memory at its start.
"""

from __future__ import annotations

import argparse
from itertools import chain, product

import torch
from recompute import MIB, PRECISIONS, allocations, forward, images_of, step

from dsyolo.config import spec
from dsyolo.models.activation_memory import Activations, count_activations
from dsyolo.models.yolov5 import VARIANTS, build_yolov5

NUM_CLASSES = 80


def kept(counted: Activations, checkpointed: frozenset[str]) -> int:
    """Bytes alive after a forward pass: what each node keeps, and the maps."""
    sets = [node.inputs if node.name in checkpointed else node.saved for node in counted.nodes]
    return counted.bytes_of(chain(*sets, counted.nodes[-1].outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=VARIANTS, nargs="+", default=["yolov5n", "yolov5s", "yolov5m"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 640], metavar="PX")
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.batch} images; MiB\n")
    print("| model | px | precision | recomputed | counted | kept | off |\n|---|---|---|---|---|---|---|")
    for model, size_px, precision in product(options.models, options.sizes, PRECISIONS):
        network, images = build_yolov5(model, NUM_CLASSES), images_of(options.batch, size_px)
        counted = count_activations(network, tuple(images.shape), spec.PRECISIONS[precision])
        step(network, images, precision)  # what is made once is there from now on
        for names in (frozenset[str](), network.blocks()):
            network.checkpointed = names
            measured, _ = allocations(lambda: forward(network, images, precision))  # noqa: B023
            expected = kept(counted, names)
            cells = (model, size_px, precision, "blocks" if names else "none", f"{expected / MIB:.2f}")
            print(
                f"| {' | '.join(map(str, cells))} | {measured / MIB:.2f} | {measured / expected - 1:+.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
