"""Choosing the tokens of a caption: greedy and beam search over next-token logits.

Letters: B captions, K beams, L length so far, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.layers.finite import check_finite

NEVER = -1.0e9  # a score that no text has
LOGITS = "rows of next-token logits"


class Reader(Protocol):
    """What the search needs of a model; it keeps its own cache, if it has one."""

    def __call__(self, ids_RL: Tensor) -> Tensor:
        """Logits (R, V) of the token after `ids_RL`: the prompt and all written so far."""

    def reorder(self, rows_S: Tensor) -> None:
        """The next call has S rows, and its row s goes on from row `rows_S[s]` of the last one."""


@torch.no_grad()
def write(
    reader: Reader,
    prompt_BL: Tensor,
    *,
    max_new_tokens: int,
    eos_id: int,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    pad_id: int = 0,
) -> Tensor:
    """New ids after a prompt, (B, <= max_new_tokens); rows that ended are filled with `pad_id`.

    Args:
        prompt_BL: (B, L), the same length in every row (no padding).
        min_new_tokens: the end token is not chosen before this many tokens.
        num_beams: 1 takes the likeliest token each time; more keep that many beginnings (published
            captions: 5).
        length_penalty: the score of a finished text is its log-probability over its length to this
            power.

    Raises:
        ValueError: for lengths or beams that leave nothing to search.
    """
    if max_new_tokens < 1 or num_beams < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"captions need 1 or more beams and 0 <= min_new_tokens <= max_new_tokens, at least 1: "
            f"{num_beams=}, {min_new_tokens=}, {max_new_tokens=}"
        )
    if num_beams == 1:
        return _greedy(reader, prompt_BL, max_new_tokens, eos_id, min_new_tokens, pad_id)
    return _beams(reader, prompt_BL, max_new_tokens, eos_id, min_new_tokens, num_beams, length_penalty, pad_id)


def _greedy(reader: Reader, prompt_BL: Tensor, longest: int, eos_id: int, shortest: int, pad_id: int) -> Tensor:
    ids, prompt = prompt_BL, prompt_BL.shape[1]
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(longest):
        logits = check_finite(reader(ids).float(), LOGITS)
        if step < shortest:
            logits[:, eos_id] = -torch.inf
        token = logits.argmax(dim=-1).masked_fill(ended, pad_id)
        ids = torch.cat([ids, token[:, None]], dim=1)
        ended |= token == eos_id
        if bool(ended.all()):
            break
    return ids[:, prompt:]


def _beams(
    reader: Reader, prompt_BL: Tensor, longest: int, eos_id: int, shortest: int, beams: int, length_penalty: float, pad_id: int
) -> Tensor:
    """Beam search as transformers does it with `early_stopping=False`: 2K candidates a step, of
    which those that end among the best K are finished; a row is done when its best running beam
    cannot pass the worst of K finished ones."""
    batch, prompt = prompt_BL.shape
    rows = torch.arange(batch, device=prompt_BL.device)
    firsts = rows[:, None] * beams
    running = prompt_BL[:, None].expand(batch, beams, prompt)
    scores = torch.full((batch, beams), NEVER, device=prompt_BL.device)
    scores[:, 0] = 0.0  # the beams are still equal, so that one speaks for all
    finished = torch.full((batch, beams, longest), pad_id, device=prompt_BL.device)
    finished_scores = torch.full_like(scores, NEVER)
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=prompt_BL.device)
    for step in range(1, longest + 1):
        read = prompt_BL if step == 1 else running.flatten(0, 1)
        logs = F.log_softmax(check_finite(reader(read).float(), LOGITS), dim=-1)
        if step <= shortest:
            logs[:, eos_id] = -torch.inf
        logs = logs[:, None] if step == 1 else logs.unflatten(0, (batch, beams))
        best, places = (logs + scores[..., None]).flatten(1).topk(2 * beams)
        parents, tokens = places // logs.shape[2], places % logs.shape[2]
        texts = torch.cat([_of(running, parents), tokens[..., None]], dim=2)
        ends = (tokens == eos_id) | (step == longest)

        counts = ends & improvable
        counts[:, beams:] = False
        candidates = torch.where(counts, best / step**length_penalty, NEVER)
        new = F.pad(texts[..., prompt:], (0, longest - step), value=pad_id)
        finished_scores, kept = torch.cat([finished_scores, candidates], dim=1).topk(beams)
        finished = _of(torch.cat([finished, new], dim=1), kept)

        scores, kept = (best + ends * NEVER).topk(beams)
        running, parents = _of(texts, kept), parents.gather(1, kept)
        improvable &= scores[:, :1] / step**length_penalty > finished_scores[:, -1:]
        if step == longest or not bool(improvable.any()):
            break
        reader.reorder((parents + firsts).flatten() if step > 1 else rows.repeat_interleave(beams))
    chosen = finished[:, 0]
    written = (chosen == eos_id).int().argmax(dim=1) + 1  # up to the end token, where there is one
    written = torch.where((chosen == eos_id).any(dim=1), written, step)
    return chosen[:, : int(written.max())]


def _of(items_BKL: Tensor, places_BJ: Tensor) -> Tensor:
    """Items of each row by their places: (B, J, L)."""
    return items_BKL.gather(1, places_BJ[..., None].expand(-1, -1, items_BKL.shape[2]))
