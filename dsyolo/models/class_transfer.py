"""Takes the last layer of a detector over to other classes: what is there for a class goes by its name."""

from collections.abc import Mapping, Sequence

import torch

NUM_BOX_OUTPUTS = 5  # x, y, w, h and objectness come before the classes


def head_of_classes(
    fresh: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    names: Sequence[str],
    given_names: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Return the convolutions of a head for `names`, from those of `given_names`.

    The rows of box and objectness are taken over, and those of each class that has the same name in both. Other classes
    keep what they have in `fresh`.

    Args:
        fresh: tensors (A * (5 + K), ...) of the head to train, by name.
        given: tensors (A * (5 + K'), ...) of the head in the weights, by the same names.

    Raises:
        ValueError: the two have another number of anchors or channels.
    """
    rows = [
        *range(NUM_BOX_OUTPUTS),
        *(NUM_BOX_OUTPUTS + i for i, name in enumerate(names) if name in given_names),
    ]
    taken = [
        *range(NUM_BOX_OUTPUTS),
        *(NUM_BOX_OUTPUTS + given_names.index(name) for name in names if name in given_names),
    ]
    heads = {}
    for name, tensor in fresh.items():
        outputs, given_outputs = NUM_BOX_OUTPUTS + len(names), NUM_BOX_OUTPUTS + len(given_names)
        other = given.get(name)
        if (
            other is None
            or tensor.shape[1:] != other.shape[1:]
            or len(tensor) * given_outputs != len(other) * outputs
        ):
            raise ValueError(f"{name} has other anchors or channels there")
        head = tensor.detach().clone().view(-1, outputs, *tensor.shape[1:])
        head[:, rows] = other.to(head.dtype).view(-1, given_outputs, *tensor.shape[1:])[:, taken]
        heads[name] = head.view(tensor.shape)
    return heads
