"""What in a picture a score hangs on: gradient times input at the encoder's output.

For each number that the encoder gives for a patch that is, to first order, how far the score would
move if it were what it is in the picture on average (Simonyan et al. 2014; Ancona et al. 2018,
section 3); a patch has the sum of their sizes, whatever speaks for the score or against it. It needs
no attention weights, so it holds for every encoder, middleware and decoder, and costs a forward and
a backward pass behind the encoder.

Letters: P visual tokens, D width, G patches along a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.collate.encode import TooLong
from lightning_internvl.data.processors.basic import Processor
from lightning_internvl.encoders.tower import special_tokens
from lightning_internvl.inference.predictor import Predictor, in_precision
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.model.vlm import VLM, shifts_labels
from lightning_internvl.objectives import NextToken, similarities

Grid = list[list[int]]  # rows of a picture's parts, from 0 to MOST
MOST = 99
SIDE = 16  # of a grid, at most
NEAR = 8  # of 255: how far a corner may lie inside


def relevance(model: VLM, score: Callable[[], Tensor]) -> Grid | None:
    """How much a score hangs on each part of a picture.

    No gradient reaches the weights, and no random number is drawn if the score draws none.

    Args:
        score: runs the model on one square and returns a scalar.

    Returns:
        None where the encoder's tokens form no square, or the score hangs on no part
    """
    with torch.enable_grad(), _uncompiled(model), _states(model.encoder) as states:
        slopes = torch.autograd.grad(score(), states, allow_unused=True)
    pairs = [(state.detach(), slope) for state, slope in zip(states, slopes, strict=True) if slope is not None]
    grids = [_grid(*pair, special_tokens(model.encoder)) for pair in pairs]
    known = [grid for grid in grids if grid is not None]
    if not known:
        return None
    total_GG = torch.stack(known).sum(dim=0)
    if len(total_GG) > SIDE:
        total_GG = F.adaptive_avg_pool2d(total_GG[None], SIDE)[0]
    top = float(total_GG.max())
    return (total_GG * MOST / top).round().int().tolist() if 0 < top < math.inf else None


@contextmanager
def _states(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """What the encoder returns inside, as leaves that gradients are asked for; of the encoder itself
    no graph is kept."""
    leaves: list[Tensor] = []

    def before(*_: Any) -> None:
        torch.set_grad_enabled(False)

    def after(module: nn.Module, inputs: Any, found: list[Tensor]) -> list[Tensor]:
        torch.set_grad_enabled(True)
        states = [state.detach().requires_grad_() for state in found]
        leaves.extend(states)
        return states

    hooks = encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after)
    try:
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()


def _uncompiled(model: VLM) -> Any:
    """Compiled blocks run as they are inside: another variant of each would take longer to make."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _grid(state_1PD: Tensor, slope_1PD: Tensor, special: int) -> Tensor | None:
    """(G, G); None of tokens that are no square of patches."""
    if state_1PD.ndim != 3 or len(state_1PD) != 1:
        return None
    side = math.isqrt(state_1PD.shape[1])
    first = state_1PD.shape[1] - side**2
    if first not in (0, special):
        return None
    state_PD, slope_PD = state_1PD[0, first:].float(), slope_1PD[0, first:].float()
    return (slope_PD * (state_PD - state_PD.mean(dim=0))).abs().sum(dim=-1).view(side, side).cpu()


def of_similarity(predictor: Predictor, picture: np.ndarray, text_1E: Tensor, mode: str) -> Grid | None:
    """Of the cosine of a picture (H, W, 3) uint8 and a text (1, E)."""
    if not sees_whole(predictor.pairs.processor, *picture.shape[:2]):
        return None
    return relevance(predictor.model, lambda: similarities(predictor.embed_images([picture], mode), text_1E).sum())


def of_caption(predictor: Predictor, picture: np.ndarray, caption: str) -> Grid | None:
    """Of the log-likelihood of a caption that the middleware reads beside a picture (H, W, 3)
    uint8."""
    if not sees_whole(predictor.pairs.processor, *picture.shape[:2]):
        return None
    batch = _placed(predictor, predictor.pairs([{"image": picture, "caption": caption, "key": "probe"}]))
    stream = TextStream("itg", batch["itg_ids"], batch["itg_mask"])
    return relevance(predictor.model, lambda: _caption_score(predictor, batch["pixel_values"], stream, batch["itg_labels"]))


@in_precision
def _caption_score(predictor: Predictor, pixels: Tensor, stream: TextStream, labels_1L: Tensor) -> Tensor:
    middleware = predictor.model.middleware
    visual = predictor.model.encoder(pixels, layers=middleware.layers[:1])[0]
    ((_, states_1LM),) = middleware.stream_states(visual, [stream])
    return likelihood(states_1LM, labels_1L, middleware.head)


def of_answer(predictor: Predictor, sample: Mapping[str, Any], answer: str) -> Grid | None:
    """Of the log-likelihood of an answer to a conversation that ends with a question, a sample as
    `Predictor.complete` takes it; None unless it shows one picture."""
    shown = sample["images"]
    if len(shown) != 1 or not sees_whole(predictor.chats.processor, *shown[0].shape[:2]):
        return None
    said = [*sample["conversation"], {"role": "assistant", "content": answer}]
    try:
        batch = _placed(predictor, predictor.chats([{**sample, "conversation": said}]))
    except TooLong:  # a conversation that training would leave out too
        return None
    return relevance(predictor.model, lambda: _answer_score(predictor, batch))


@in_precision
def _answer_score(predictor: Predictor, batch: dict[str, Any]) -> Tensor:
    hidden, labels = predictor.model.hidden_states(**batch)
    decoder = predictor.model.decoder
    return likelihood(hidden, labels, decoder.head, shifts=shifts_labels(decoder))


def likelihood(hidden_BLH: Tensor, labels_BL: Tensor | None, head: Callable[[Tensor], Tensor], *, shifts: bool = True) -> Tensor:
    """The log-likelihood of all labelled tokens of this process, a scalar (see `NextToken`)."""
    assert labels_BL is not None  # the collators give them
    if shifts:
        hidden_BLH, labels_BL = hidden_BLH[:, :-1], labels_BL[:, 1:]
    places = labels_BL != IGNORE_INDEX
    return -NextToken(chunk=None).total_loss(hidden_BLH[places], labels_BL[places], head)


def _placed(predictor: Predictor, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: predictor.placed(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def sees_whole(processor: Processor, height: int, width: int) -> bool:
    """Whether a picture of that size is one square from corner to corner, so that a grid of patches
    lies on it as on the square."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    seen = processor(picture)
    if seen.ndim != 4 or len(seen) != 1:
        return False
    first, last = seen[0, 0, 0, :2], seen[0, -1, -1, :2]
    return bool((first <= NEAR).all() and (last >= 255 - NEAR).all())
