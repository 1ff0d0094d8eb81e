"""A linear layer and the cross-entropy behind it, without ever holding all logits (Hsu et al. 2024,
Liger Kernel, section 3.2).

Letters: T tokens, H width of states, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Judge = Callable[..., tuple[Tensor, Tensor]]  # `losses_and_gradient`, or it compiled


def plain_layer(head: Callable[[Tensor], Tensor]) -> nn.Linear | None:
    """The linear layer that a head is or just calls; None where it does more.

    A part's `head` method is known by the part's `output_layer`. Adapters, quantised weights, hooks
    and weights that are sharded act when the layer is called, so such layers are no plain ones.
    """
    owner = getattr(head, "__self__", None)
    layer = head if isinstance(head, nn.Module) else getattr(owner, "output_layer", None)
    if type(layer) is not nn.Linear or isinstance(layer.weight, DTensor):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    return layer


def linear_cross_entropy(
    states_TH: Tensor,
    layer: nn.Linear,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    *,
    pieces: int,
    label_smoothing: float,
    judge: Judge,
) -> Tensor:
    """The sum over tokens of the cross-entropy of `layer(states)`, each times its weight where there
    are weights, in float32, a scalar; its gradient can be taken once.

    The gradients of states, weight and bias are found in the forward pass, chunk by chunk, right
    when the logits are there, so that nothing is computed twice.

    Args:
        targets_T: ids from 0 to V - 1.
        pieces: chunks that the tokens are divided into.
    """
    return _LinearCrossEntropy.apply(states_TH, layer.weight, layer.bias, targets_T, weights_T, pieces, label_smoothing, judge)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        pieces: int,
        smoothing: float,
        judge: Judge,
    ) -> Tensor:
        kind = states.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        rows = states.to(low)
        # sums over chunks are kept in float32
        like = (rows, low), (weight, torch.float32), (bias, torch.float32)
        needed = zip(like, ctx.needs_input_grad[:3], strict=True)
        grads = [torch.empty_like(x, dtype=dtype) if needs and x is not None else None for (x, dtype), needs in needed]
        with torch.autocast(kind, enabled=False):
            # In the lower type once, as `torch.autocast` would make them for each chunk.
            layer = weight.to(low), None if bias is None else bias.to(low)
            split = _parts(weights, pieces), _parts(grads[0], pieces)
            parts = zip(rows.tensor_split(pieces), targets.tensor_split(pieces), *split, strict=True)
            judged = partial(judge, smoothing=smoothing)
            totals = [
                _chunk_loss(part, layer, wanted, weighed, (place, *grads[1:]), judged, first=number == 0)
                for number, (part, wanted, weighed, place) in enumerate(parts)
            ]
            total = sum(totals[1:], totals[0])
        ctx.save_for_backward(*grads)
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because a second copy of the weight's gradient would be as large as many chunks
        # of logits. Should the gradient be taken twice, autograd sees that what it kept has
        # changed, and says so.
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if grad is None else grad.mul_(factor).to(dtype) for grad, dtype in found]
        return *grads, None, None, None, None, None


def _parts(x: Tensor | None, pieces: int) -> Sequence[Tensor | None]:
    return [None] * pieces if x is None else x.tensor_split(pieces)


def _chunk_loss(
    states_CH: Tensor,
    layer: tuple[Tensor, Tensor | None],
    targets_C: Tensor,
    weights_C: Tensor | None,
    grads: Sequence[Tensor | None],
    judge: Judge,
    *,
    first: bool,
) -> Tensor:
    """The summed loss of a chunk; gradients are written to those of its states and, but for the
    first chunk, added to those of weight and bias."""
    (weight_VH, bias_V), (grad_states, grad_weight, grad_bias) = layer, grads
    weight_HV = weight_VH.T
    logits_CV = states_CH @ weight_HV if bias_V is None else torch.addmm(bias_V, states_CH, weight_HV)
    losses_C, grad_CV = judge(logits_CV, targets_C)
    if weights_C is not None:
        losses_C, grad_CV = losses_C * weights_C, grad_CV.mul_(weights_C[:, None])
    if grad_states is not None:
        torch.mm(grad_CV, weight_VH, out=grad_states)
    if grad_weight is not None and grad_CV.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad_CV.T, states_CH, beta=0 if first else 1)
    elif grad_weight is not None:
        _put(grad_weight, grad_CV.T @ states_CH, first)
    if grad_bias is not None:
        _put(grad_bias, grad_CV.sum(dim=0, dtype=grad_bias.dtype), first)
    return losses_C.sum()


def _put(total: Tensor, part: Tensor, first: bool) -> None:
    """Begin a sum that was not filled before, or add to it."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def losses_and_gradient(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses (C,), computed in float32, and the gradient of their sum (C, V) in the type of the
    logits, whose place it takes where that is float32."""
    targets_C1, vocabulary = targets_C[:, None], logits_CV.shape[1]
    exact_CV = logits_CV.float()
    right_C1 = exact_CV.gather(1, targets_C1)
    mean_C1 = exact_CV.mean(dim=1, keepdim=True) if smoothing else None
    top_C1 = exact_CV.amax(dim=1, keepdim=True)
    odds_CV = exact_CV.sub_(top_C1).exp_()
    sum_C1 = odds_CV.sum(dim=1, keepdim=True)
    losses_C1 = sum_C1.log() + top_C1 - (1 - smoothing) * right_C1
    grad_CV = odds_CV.div_(sum_C1)
    if mean_C1 is not None:
        losses_C1 -= smoothing * mean_C1
        grad_CV -= smoothing / vocabulary
    pulled_C1 = grad_CV.gather(1, targets_C1) + (smoothing - 1)
    # one element a row, after the type has changed: no further pass over all
    grad_CV = grad_CV.to(logits_CV.dtype).scatter_(1, targets_C1, pulled_C1.to(logits_CV.dtype))
    return losses_C1.squeeze(1), grad_CV
