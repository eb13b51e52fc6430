"""`dsyolo val`: validate weights on the val split of a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsyolo.base.errors import UserError
from dsyolo.base.text import escaped
from dsyolo.commands.weights_options import add_number, add_weights_options, load
from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.option_checks import cannot_replace_json, write_json
from dsyolo.config.recipe import DEFAULT_RECIPE, Recipe
from dsyolo.config.run_config import RunConfig
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.index_builder import build_index

if TYPE_CHECKING:
    from dsyolo.data.loader import EvalLoader
    from dsyolo.detection.evaluator import ImageResult
    from dsyolo.detection.loss import DetectionLoss
    from dsyolo.detection.validation_loss import PredictBatch
    from dsyolo.inference.loaded_network import LoadedNetwork


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: the weights, the data set, and how it is read."""
    add_weights_options(parser, score=0.001, iou=0.6)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="data set's YAML file")
    add_number(parser, "--batch_size", 16, "images at a time", field="val_batch_size")
    add_number(parser, "--workers", 1, "loader processes")
    flag, text = argparse.BooleanOptionalAction, RunConfig.model_fields["rect_val"].description
    parser.add_argument("--rect_val", action=flag, default=True, help=text)
    text = "write the confusion matrix and the curves of precision, recall and F1 into this folder"
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics to this file")


def run(args: argparse.Namespace) -> int:
    """Print the table of metrics and the losses, and write them as JSON where asked; return 0.

    Raises UserError where weights or data cannot be used, or not together.
    """
    from dsyolo.detection.evaluator import validate  # late, so that `--help` does not wait for torch

    if args.json and (problem := cannot_replace_json(args.json, "map50_95")):
        raise UserError("The metrics cannot be written", [f"--json: {problem}"])
    if args.pictures and (problem := cannot_hold_files(args.pictures)):
        raise UserError(f"--pictures {args.pictures} cannot be used", [problem])
    network = load(args, multi_label=True)
    loader = _loader(args, network)
    names = network.class_names
    recipe, source = _recipe_of(args.weights)
    loss, predict = _measuring(network, recipe)
    metrics, results = validate(predict, loader, network.postprocess, names, lambda item: [item], loss)
    print(escaped("\n".join([metrics.table(), *metrics.notes(), f"gains of the loss: {source}"])))
    if args.json:
        write_json(args.json, metrics.to_json())
    if args.pictures:
        _draw(args.pictures, results, names)
    return 0


def _draw(folder: Path, results: list[ImageResult], names: Sequence[str]) -> None:
    from dsyolo.detection.confusion import confusion_matrix
    from dsyolo.detection.curves import curves
    from dsyolo.detection.metrics import compare
    from dsyolo.tracking.validation_plots import save_confusion, save_validation_curves

    folder.mkdir(parents=True, exist_ok=True)
    save_confusion(folder / "confusion_matrix.png", confusion_matrix(results, len(names)), names)
    ground_truths, found = [ground_truth for ground_truth, _ in results], [one for _, one in results]
    save_validation_curves(folder, curves(compare(ground_truths, found, names)), names)
    print(escaped(f"pictures: {folder}", lines=False))


def _recipe_of(weights: Path) -> tuple[Recipe, str]:
    """Return the recipe of the run that wrote the weights, where they lie in its folder, and where it is from."""
    config = weights.absolute().parent.parent / "config.yaml"
    if config.is_file():
        with suppress(UserError):  # of something else, or of an older edition
            return RunConfig.load(config).recipe, str(config)
    return DEFAULT_RECIPE, f"those of preset low, as {config.name} of the run is not beside the weights"


def _measuring(network: LoadedNetwork, recipe: Recipe) -> tuple[DetectionLoss, PredictBatch]:
    """Return the loss that the network would be trained with, and a prediction that measures it."""
    import torch

    from dsyolo.detection.assigner import Assigner
    from dsyolo.detection.loss import DetectionLoss
    from dsyolo.detection.validation_loss import predict_with_loss

    anchors, strides = network.anchors, network.strides
    loss = DetectionLoss(anchors, len(network.class_names), network.image_size_px, recipe)
    assign = Assigner((anchors * torch.tensor(strides).view(-1, 1, 1)).numpy(), strides, recipe.anchor_t)
    return loss, partial(predict_with_loss, partial(network.predict.with_loss, loss), assign)


def _loader(args: argparse.Namespace, network: LoadedNetwork) -> EvalLoader:
    import torch

    from dsyolo.data.dataset import DetectionDataset
    from dsyolo.data.loader import EvalLoader
    from dsyolo.data.split_checks import refuse_lost_objects

    data = read_data_yaml(args.data, required=("val",))
    if sorted(data.names) != sorted(network.class_names):
        given = f"{', '.join(network.class_names)} in the weights, {', '.join(data.names)} in the data"
        raise UserError(
            f"{args.weights} cannot be validated on {args.data}",
            [f"names: {given}. They must be the same, in any order."],
        )
    split = build_index(data.val or (), data.num_classes, num_keypoint_values=data.num_keypoint_values)
    for line in refuse_lost_objects(data, {"val": split}):
        print(escaped(f"Warning: {line}"), file=sys.stderr)
    if data.names != network.class_names:
        print(
            f"Note: {args.data} has the classes of the weights in another order: matched by name.",
            file=sys.stderr,
        )
        import numpy as np

        place = np.array([network.class_names.index(name) for name in data.names])
        split = replace(split, classes=place[split.classes])
    return EvalLoader(
        DetectionDataset(split, network.image_size_px),
        image_size_px=network.image_size_px,
        stride=network.stride,
        batch_size=args.batch_size,
        rank=0,
        world_size=1,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        rectangular=args.rect_val,
    )
