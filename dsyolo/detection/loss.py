"""The loss of YOLOv5 (docs/yolov5.md, Loss), normalised by counts that come with the targets.

It divides by `targets.num_matches` and `targets.num_images` alone, which are those of the global batch. So the
micro-batches of a step, on whichever rank, add up to the loss of the global batch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dsyolo.base.batch import Targets
from dsyolo.config.recipe import DEFAULT_RECIPE, Recipe
from dsyolo.detection.boxes import paired_ciou

# Objectness weight per level, finest first, by the number of levels. YOLOv5 has 3 or 4; the others follow its 4.
BALANCE = {
    1: (4.0,),
    2: (4.0, 1.0),
    3: (4.0, 1.0, 0.4),
    4: (4.0, 1.0, 0.25, 0.06),
    5: (4.0, 1.0, 0.25, 0.06, 0.015),
}
FOCAL_ALPHA = 0.25


class DetectionLoss(nn.Module):
    """Box, objectness and class loss of raw maps.

    Args:
        anchors: (L, A, 2) widths and heights in cells.
        num_classes: K.
        image_size_px: of the training images; scales the objectness gain.
        recipe: gains before scaling, weights of positives, focal loss, label smoothing.
    """

    anchors: torch.Tensor
    cls_pw: torch.Tensor
    obj_pw: torch.Tensor

    def __init__(
        self, anchors: torch.Tensor, num_classes: int, image_size_px: int, recipe: Recipe = DEFAULT_RECIPE
    ) -> None:
        super().__init__()
        per_level = 3 / len(anchors)
        self.num_classes = num_classes
        self.gains = (
            recipe.box * per_level,
            recipe.obj * (image_size_px / 640) ** 2 * per_level,
            recipe.cls * num_classes / 80 * per_level,
        )
        self.balance = BALANCE[len(anchors)]
        self.fl_gamma = recipe.fl_gamma
        self.class_targets = (1 - recipe.label_smoothing / 2, recipe.label_smoothing / 2)
        self.register_buffer("anchors", anchors.clone(), persistent=False)
        self.register_buffer("cls_pw", torch.tensor([recipe.cls_pw]), persistent=False)
        self.register_buffer("obj_pw", torch.tensor([recipe.obj_pw]), persistent=False)

    def forward(self, maps: tuple[torch.Tensor, ...], targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of these maps' share of the batch that `targets` counts.

        Args:
            maps: raw maps, (B, A, H, W, 5 + K) per level, of any float dtype.
            targets: of the same B images; its counts may be those of a larger batch.

        Returns:
            The total to differentiate, summed over images: (box + obj + cls) * targets.num_images; and the three
            parts (3,) per image, with gains, detached.
        """
        box = obj = cls = maps[0].new_zeros((), dtype=torch.float32)
        for level, raw in enumerate(maps):
            level_box, level_obj, level_cls = self._level(level, raw, targets)
            box, obj, cls = box + level_box, obj + self.balance[level] * level_obj, cls + level_cls
        parts = torch.stack((box * self.gains[0], obj * self.gains[1], cls * self.gains[2]))
        return parts.sum() * targets.num_images, parts.detach()

    @torch.no_grad()
    def level_sums(self, maps: tuple[torch.Tensor, ...], targets: Targets) -> torch.Tensor:
        """Return box, objectness and class loss of each level, (L, 3), without gains and not normalised.

        Box and class loss are summed over the level's matches; objectness over images, each a mean over its cells.
        """
        ones = torch.ones_like(targets.num_matches), torch.ones_like(targets.num_images)
        targets = Targets._make((*targets[:-2], *ones))
        return torch.stack([torch.stack(self._level(level, raw, targets)) for level, raw in enumerate(maps)])

    def _level(self, level: int, raw: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, ...]:
        b, num_anchors, h, w, _ = raw.shape
        cells, weights = targets.cells[level], targets.weights[level]
        per_match = weights / targets.num_matches[level].clamp(min=1)
        plane = h * w
        anchor, cell = cells // plane % num_anchors, cells % plane
        found = raw[cells // (num_anchors * plane), anchor, cell // w, cell % w].float()  # (M, 5 + K)

        s = found[:, :4].sigmoid() * 2
        predicted = torch.cat((s[:, :2] - 0.5, s[:, 2:].square() * self.anchors[level, anchor]), 1)
        ciou = paired_ciou(predicted, targets.boxes[level])
        box = ((1 - ciou) * per_match).sum()

        cls = raw.new_zeros((), dtype=torch.float32)
        if self.num_classes > 1:
            positive, negative = self.class_targets
            wanted = torch.full_like(found[:, 5:], negative)
            wanted.scatter_(1, targets.classes[level][:, None], positive)
            cls = (self._cross_entropy(found[:, 5:], wanted, self.cls_pw).mean(1) * per_match).sum()

        # If several matches share one anchor of one cell, the highest IoU wins, whatever their order.
        quality = torch.zeros(b * num_anchors * plane, device=raw.device)
        quality.scatter_reduce_(0, cells, ciou.detach().clamp(min=0) * weights, "amax")
        objectness = self._cross_entropy(raw[..., 4].float(), quality.view(b, num_anchors, h, w), self.obj_pw)
        return box, objectness.sum() / (targets.num_images * (num_anchors * plane)), cls

    def _cross_entropy(
        self, logits: torch.Tensor, wanted: torch.Tensor, pos_weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each element, times alpha_t (1 - p_t)^gamma if focal (arXiv:1708.02002)."""
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=pos_weight, reduction="none")
        if self.fl_gamma > 0:
            p = logits.sigmoid()
            p_t = wanted * p + (1 - wanted) * (1 - p)
            alpha_t = wanted * FOCAL_ALPHA + (1 - wanted) * (1 - FOCAL_ALPHA)
            loss = loss * alpha_t * (1 - p_t).pow(self.fl_gamma)
        return loss
