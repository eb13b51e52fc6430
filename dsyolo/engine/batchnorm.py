"""Synchronised BatchNorm: statistics over the micro-batches of all data-parallel ranks."""

from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import nn

from dsyolo.models.blocks import BatchNorm


def synchronise_batchnorm(network: nn.Module, group: torch_dist.ProcessGroup | None = None) -> None:
    """Make every BatchNorm of `network` normalise over the ranks of `group` in training.

    So R ranks with m images each train as one with R x m. Parameters and buffers keep their names. All ranks of the
    group (None: all ranks) must run the same forwards and backwards in the same order.
    """
    for module in network.modules():
        if isinstance(module, BatchNorm):
            normalise = partial(batch_norm, group=group)
            module.normalise = normalise  # type: ignore[method-assign]  # as `BatchNorm.normalise` allows


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *,
    group: torch_dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Compute `F.batch_norm` over the batches of all ranks of `group`. Gradients of weight and bias are this rank's.

    `x` is (B, C, H, W) of any floating type; the other tensors are (C,) float32.
    """
    size = torch_dist.get_world_size(group)
    if not training or size == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    group = group or torch_dist.group.WORLD
    if x.device.type == "cpu":
        return _CpuSyncBatchNorm.apply(x, running_mean, running_var, weight, bias, momentum, eps, group)
    from torch.nn.modules._functions import SyncBatchNorm  # torch's kernels; it has none for a CPU

    return SyncBatchNorm.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, size)


class _CpuSyncBatchNorm(torch.autograd.Function):
    """One collective forward, one backward; in fp32, with the ranks' statistics combined in fp64."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: Any) -> torch.Tensor:
        running_mean, running_var, weight, bias, momentum, eps, group = others
        count, mean, var = _global_statistics(x, group)
        if running_mean is not None:
            running_mean.lerp_(mean.float(), momentum)
            running_var.lerp_((var * count / (count - 1)).float(), momentum)
        mean, var = mean.float(), var.float()
        ctx.save_for_backward(x, mean, (var + eps).rsqrt(), weight)
        ctx.count, ctx.group = count, group
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """For y = w x_hat + b: dx = w / std (dy - mean(dy) - x_hat mean(dy x_hat)), means over all ranks."""
        x, mean, inverse_std, weight = ctx.saved_tensors
        grad = grad.float()
        normalised = (x.float() - _by_channel(mean)) * _by_channel(inverse_std)
        sums = torch.stack((grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))))
        own = sums.clone()  # gradients of bias and weight: DeepSpeed sums those of all ranks
        torch_dist.all_reduce(sums, group=ctx.group)
        mean_grad, mean_grad_normalised = sums / ctx.count.float()
        inner = grad - _by_channel(mean_grad) - normalised.mul_(_by_channel(mean_grad_normalised))
        grad_x = inner.mul_(_by_channel(weight * inverse_std)).to(x.dtype)
        return grad_x, None, None, own[1], own[0], None, None, None


def _global_statistics(
    x: torch.Tensor, group: torch_dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (elements of a channel on all ranks (), mean (C,), biased variance (C,)), all fp64.

    Ranks exchange means and variances, since differences of sums of squares lose digits. The variance is the mean of
    variances plus the variance of means, weighted by the ranks' elements.
    """
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    own = torch.cat((mean, var, mean.new_tensor([x.numel() // x.shape[1]]))).double()
    parts = [torch.empty_like(own) for _ in range(torch_dist.get_world_size(group))]
    torch_dist.all_gather(parts, own, group=group)
    means, variances, counts = torch.stack(parts).split([len(mean), len(var), 1], 1)
    count = counts.sum()
    shares = counts / count
    mean = (means * shares).sum(0)
    return count, mean, ((variances + (means - mean).square()) * shares).sum(0)


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    return values[None, :, None, None]
