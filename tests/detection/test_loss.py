"""The loss: its parts by hand, and that micro-batches add up to the batch, which all of training rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsyolo.base.batch import Targets
from dsyolo.config.recipe import Recipe
from dsyolo.detection.assigner import Assigner
from dsyolo.detection.boxes import paired_ciou
from dsyolo.detection.loss import BALANCE, DetectionLoss
from dsyolo.models.yolov5 import anchors_px, level_strides

NUM_CLASSES, SIZE_PX = 3, 64
ASSIGN = Assigner(anchors_px("yolov5n").numpy(), level_strides("yolov5n"), 4.0)


def anchors_in_cells(variant: str = "yolov5n") -> torch.Tensor:
    return anchors_px(variant) / torch.tensor(level_strides(variant)).view(-1, 1, 1)


def make_loss(num_classes: int = NUM_CLASSES, **settings) -> DetectionLoss:
    return DetectionLoss(anchors_in_cells(), num_classes, SIZE_PX, Recipe(**settings))


def random_maps(num_images: int, seed: int = 0, num_classes: int = NUM_CLASSES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = [SIZE_PX // stride for stride in ASSIGN.strides]
    shapes = [(num_images, 3, side, side, 5 + num_classes) for side in sides]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def random_labels(num_images: int, seed: int = 0, num_labels: int = 30) -> tuple[np.ndarray, ...]:
    """Image 1 has none; many are alike, so that some share one anchor of one cell."""
    rng = np.random.default_rng(seed)
    images = np.sort(rng.integers(0, num_images, num_labels))
    images[images == 1] = 0
    boxes = np.concatenate((rng.uniform(4, 60, (num_labels, 2)), rng.uniform(6, 60, (num_labels, 2))), 1)
    boxes[::3] = boxes[0] + rng.uniform(-0.5, 0.5, (len(boxes[::3]), 4))
    return images, rng.integers(0, NUM_CLASSES, num_labels), boxes.astype(np.float32)


def assign(labels: tuple[np.ndarray, ...], first: int, count: int) -> Targets:
    """The targets of images `first` .. `first + count - 1`, as a micro-batch has them."""
    images, classes, boxes = labels
    own = (images >= first) & (images < first + count)
    return ASSIGN(images[own] - first, classes[own], boxes[own], count, (SIZE_PX, SIZE_PX))


def run(loss: DetectionLoss, maps, targets: Targets):
    """Total, parts, and the gradient of each map."""
    leaves = [raw.detach().clone().requires_grad_() for raw in maps]
    total, parts = loss(tuple(leaves), targets)
    total.backward()
    return total.detach(), parts, [leaf.grad for leaf in leaves]


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    torch.testing.assert_close(a[1], b[1], **tolerance)
    torch.testing.assert_close(a[2], b[2], **tolerance)


# ---- the promise: micro-batches add up


@pytest.mark.parametrize(
    "settings", [{}, {"fl_gamma": 1.5, "label_smoothing": 0.1, "obj_pw": 2.0, "cls_pw": 0.5}]
)
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(micro, settings):
    loss, maps, labels = make_loss(**settings), random_maps(4), random_labels(4)
    targets = assign(labels, 0, 4)
    assert (targets.num_matches > 0).all()
    whole = run(loss, maps, targets)

    total, parts, grads = 0, 0, []
    for first in range(0, 4, micro):
        count = min(micro, 4 - first)  # 3 leaves a smaller one over
        own = assign(labels, first, count)
        assert not own.num_matches.equal(targets.num_matches)
        own = own._replace(num_matches=targets.num_matches, num_images=targets.num_images)
        one = run(loss, [raw[first : first + count] for raw in maps], own)
        total, parts = total + one[0], parts + one[1]
        grads.append(one[2])
    joined = [torch.cat(level) for level in zip(*grads, strict=True)]
    assert_same(whole, (total, parts, joined), rtol=1e-5, atol=1e-6)


def test_counts_of_its_own_micro_batch_would_not_add_up():
    """Show that the counts matter at all, which the test above could miss."""
    loss, maps, labels = make_loss(), random_maps(4), random_labels(4)
    whole = run(loss, maps, assign(labels, 0, 4))[0]
    alone = sum(run(loss, [raw[i : i + 1] for raw in maps], assign(labels, i, 1))[0] for i in range(4))
    assert abs(alone / whole - 1) > 1e-3


def test_the_total_is_the_sum_of_the_parts_times_the_images():
    total, parts, _ = run(make_loss(), random_maps(4), assign(random_labels(4), 0, 4))
    assert total.item() == pytest.approx(4 * parts.sum().item(), rel=1e-6)
    assert (parts > 0).all()


# ---- what may not matter


def test_padding_does_not_matter():
    loss, maps, targets = make_loss(), random_maps(2), assign(random_labels(2), 0, 2)
    used = int(targets.num_matches.max())
    roomy = [torch.cat((t, t[:, -1:].expand(-1, 500, *t.shape[2:])), 1) for t in targets[:4]]
    exact = [t[:, :used] for t in targets[:4]]
    plain = run(loss, maps, targets)
    for rows in (roomy, exact):
        assert_same(
            plain, run(loss, maps, targets._replace(**dict(zip(Targets._fields, rows, strict=False))))
        )


def test_values_of_padding_rows_do_not_matter():
    loss, maps, targets = make_loss(), random_maps(2), assign(random_labels(2), 0, 2)
    padding = targets.weights == 0
    other = targets._replace(
        cells=targets.cells.masked_fill(padding, 5),
        classes=targets.classes.masked_fill(padding, 2),
        boxes=targets.boxes.masked_fill(padding[..., None], 3.0),
    )
    assert_same(run(loss, maps, targets), run(loss, maps, other))


def test_the_order_of_matches_does_not_matter():
    loss, maps, targets = make_loss(), random_maps(2), assign(random_labels(2), 0, 2)
    shared = [
        len(level[weight > 0]) - len(level[weight > 0].unique())
        for level, weight in zip(targets.cells, targets.weights, strict=True)
    ]
    assert sum(shared) > 3  # several matches share one anchor of one cell
    order = torch.randperm(targets.cells.shape[1], generator=torch.Generator().manual_seed(0))
    mixed = targets._replace(**{name: getattr(targets, name)[:, order] for name in Targets._fields[:4]})
    assert_same(run(loss, maps, targets), run(loss, maps, mixed))


def test_objectness_does_not_move_boxes():
    """Its target is the CIoU of the box there: that must not become a way to lower the loss."""
    loss = make_loss(box=0.0, cls=0.0)
    for grad in run(loss, random_maps(2), assign(random_labels(2), 0, 2))[2]:
        assert (grad[..., :4] == 0).all()
        assert (grad[..., 5:] == 0).all()
        assert (grad[..., 4] != 0).all()


def test_a_batch_without_labels_learns_that_nothing_is_there():
    empty = ASSIGN(
        np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.float32), 2, (SIZE_PX, SIZE_PX)
    )
    total, parts, grads = run(make_loss(), random_maps(2), empty)
    assert parts[0] == parts[2] == 0
    assert parts[1] > 0
    assert torch.isfinite(total)
    for grad in grads:
        assert (grad[..., 4] > 0).all()  # down with every objectness
        assert (grad[..., :4] == 0).all()
        assert (grad[..., 5:] == 0).all()


# ---- by hand

HAND_CELL = (1, 2, 3, 4)  # image, anchor, row, column of a level of 8 x 8 cells
HAND_BOX = (0.3, 0.6, 2.5, 4.0)
HAND_CLASS = 2


def by_hand(settings: dict, num_classes: int = NUM_CLASSES):
    """One match in the first level: (total, parts) of the loss and of the spec's formulas in floats."""
    maps = random_maps(2, seed=4, num_classes=num_classes)
    image, anchor, row, column = HAND_CELL
    cell = ((image * 3 + anchor) * 8 + row) * 8 + column
    kind = min(HAND_CLASS, num_classes - 1)
    targets = Targets(
        cells=torch.tensor([[cell], [0], [0]]),
        boxes=torch.tensor([[HAND_BOX], [(0.5,) * 4], [(0.5,) * 4]]),
        classes=torch.tensor([[kind], [0], [0]]),
        weights=torch.tensor([[1.0], [0.0], [0.0]]),
        num_matches=torch.tensor([1.0, 0.0, 0.0]),
        num_images=torch.tensor(2.0),
    )
    total, parts = make_loss(num_classes, **settings)(tuple(maps), targets)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    gamma, e = settings.get("fl_gamma", 0.0), settings.get("label_smoothing", 0.0)

    def cross_entropy(logit: float, wanted: float, pos_weight: float) -> float:
        p = sigmoid(logit)
        plain = -pos_weight * wanted * math.log(p) - (1 - wanted) * math.log(1 - p)
        p_t = wanted * p + (1 - wanted) * (1 - p)
        alpha_t = wanted * 0.25 + (1 - wanted) * 0.75
        return plain * (alpha_t * (1 - p_t) ** gamma if gamma else 1.0)

    raw = maps[0][HAND_CELL].tolist()
    aw, ah = anchors_in_cells()[0, anchor].tolist()
    found = (
        2 * sigmoid(raw[0]) - 0.5,
        2 * sigmoid(raw[1]) - 0.5,
        (2 * sigmoid(raw[2])) ** 2 * aw,
        (2 * sigmoid(raw[3])) ** 2 * ah,
    )
    ciou = paired_ciou(torch.tensor([found]), torch.tensor([HAND_BOX])).item()
    assert 0 < ciou < 1
    box = 0.05 * (1 - ciou)
    obj = 0.0
    for level, (one, balance) in enumerate(zip(maps, BALANCE[3], strict=True)):
        values = one[..., 4].flatten().tolist()
        wanted = [0.0] * len(values)
        if level == 0:
            wanted[cell] = ciou
        pos_weight = settings.get("obj_pw", 1.0)
        sums = sum(cross_entropy(v, w, pos_weight) for v, w in zip(values, wanted, strict=True))
        obj += balance * sums / len(values)
    obj *= (SIZE_PX / 640) ** 2
    wanted = [1 - e / 2 if k == kind else e / 2 for k in range(num_classes)]
    cls = sum(cross_entropy(v, w, settings.get("cls_pw", 1.0)) for v, w in zip(raw[5:], wanted, strict=True))
    cls *= 0.5 * num_classes / 80 / num_classes
    expected = [box, obj, cls if num_classes > 1 else 0.0]
    return (total.item(), parts.tolist()), (2 * sum(expected), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fl_gamma": 1.5},
        {"label_smoothing": 0.1},
        {"cls_pw": 0.3, "obj_pw": 2.5},
        {"fl_gamma": 2.0, "label_smoothing": 0.2, "cls_pw": 2.0, "obj_pw": 0.5},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_one_match_by_hand(settings):
    (total, parts), (expected_total, expected_parts) = by_hand(settings)
    assert parts == pytest.approx(expected_parts, rel=1e-5)
    assert total == pytest.approx(expected_total, rel=1e-5)
    if settings:
        assert parts != pytest.approx(by_hand({})[0][1], rel=1e-3)  # the setting does something


def test_one_class_has_no_class_loss():
    (_, parts), (_, expected) = by_hand({}, num_classes=1)
    assert parts[2] == 0
    assert parts == pytest.approx(expected, rel=1e-5)


def test_gains_scale_with_levels_classes_and_image_size():
    p5 = DetectionLoss(anchors_in_cells(), 80, 640, Recipe(box=0.05, obj=0.7, cls=0.3))
    assert p5.gains == pytest.approx((0.05, 0.7, 0.3))
    p6 = DetectionLoss(anchors_in_cells("yolov5n6"), 20, 1280, Recipe(box=0.05, obj=0.7, cls=0.3))
    assert p6.gains == pytest.approx((0.0375, 0.75 * 0.7 * 4, 0.75 * 0.3 / 4))
    assert p6.balance == (4.0, 1.0, 0.25, 0.06)


# ---- precision and memory


def test_maps_in_bf16_are_computed_in_fp32():
    loss = DetectionLoss(anchors_in_cells(), NUM_CLASSES, SIZE_PX)
    maps = [raw.bfloat16() for raw in random_maps(2)]
    targets = assign(random_labels(2), 0, 2)
    total, parts, grads = run(loss, maps, targets)
    assert total.dtype == parts.dtype == torch.float32
    expected = run(loss, [raw.float() for raw in maps], targets)
    assert total.item() == expected[0].item()
    assert parts.tolist() == expected[1].tolist()
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    for grad, wanted in zip(grads, expected[2], strict=True):
        torch.testing.assert_close(grad.float(), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.num_elements = max(self.num_elements, one.numel())
        return result


def test_memory_is_linear_in_cells_and_matches():
    """Nothing has the size of labels x cells, forward or backward."""
    maps = [raw.requires_grad_() for raw in random_maps(2)]
    targets = assign(random_labels(2, num_labels=400), 0, 2)
    capacity = targets.cells.shape[1]
    assert capacity >= 1024
    loss = make_loss()
    with Largest() as largest:
        loss(tuple(maps), targets)[0].backward()
    linear = max(*(raw.numel() for raw in maps), capacity * (5 + NUM_CLASSES))
    assert maps[0].numel() <= largest.num_elements <= linear
    assert linear < capacity * maps[0][..., 0].numel() / 10
