"""Answers drawn from a model, each from a source of chance of its own: an answer depends neither on
those that are drawn beside it nor on how many processes draw.

Letters: R rows, one for each answer, V vocabulary, T tokens of all answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from lightning_internvl.layers.finite import FiniteLogits
from lightning_internvl.model.vlm import VLM

LEAST = 2.0**-25  # of exponential noise, whose logarithm is taken


class Answers(NamedTuple):
    """What was drawn, row by row.

    Attributes:
        ids: tokens of each answer, its end among them.
        finished: whether each has come to its end; else it was cut off.
        log_probs: of the tokens of all answers when they were drawn, (T,) float32.
        entropies: of what they were drawn from, (T,) float32.
    """

    ids: list[list[int]]
    finished: list[bool]
    log_probs: Tensor
    entropies: Tensor


def drawn_from(logits: Tensor, model: VLM, temperature: float) -> Tensor:
    """Logits (..., V) as tokens are drawn from them: placeholders of pictures and videos are no
    part of an answer."""
    visual = [one for one in (model.image_token_id, model.video_token_id) if one is not None and 0 <= one < logits.shape[-1]]
    scaled = logits / temperature
    return scaled.index_fill(-1, torch.tensor(visual, device=logits.device), -torch.inf) if visual else scaled


class OwnChance(LogitsProcessor):
    """Draws each row's next token by the maximum of its log-probabilities with Gumbel noise, which is
    a draw from their softmax (Gumbel 1954), and lets nothing else be chosen.

    Args:
        seeds: of the rows.
    """

    def __init__(self, model: VLM, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.sources = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.model, self.temperature = model, temperature
        self.log_probs: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (R, V) to minus infinity but at the token that was drawn."""
        log_probs_RV = drawn_from(scores, self.model, self.temperature).log_softmax(dim=-1)
        noise_RV = torch.empty_like(log_probs_RV)
        for row, source in zip(noise_RV, self.sources, strict=True):
            row.exponential_(generator=source)
        drawn_R1 = (log_probs_RV - noise_RV.clamp(min=LEAST).log()).argmax(dim=-1, keepdim=True)
        self.log_probs.append(log_probs_RV.gather(1, drawn_R1)[:, 0])
        self.entropies.append(torch.special.entr(log_probs_RV.exp()).sum(dim=-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_R1, 0.0)


def draw_answers(
    model: VLM,
    inputs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop: dict[str, Any],
    *,
    seeds: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    together: bool = False,
) -> Answers:
    """An answer to each row of prompts.

    Args:
        inputs: of `VLM.generate`: `input_ids` (R, L) and `attention_mask`, padded on the left, and
            pictures.
        stop: options of `generate` that end an answer (see `data.tokenizer.stop_options`).
        together: whether all processes must take as many steps as the one with the longest answer,
            because weights are divided among them.

    Raises:
        ValueError: where logits are NaN.
    """
    chance = OwnChance(model, seeds, temperature, inputs["input_ids"].device)
    ids_RL = model.generate(
        **inputs,
        **stop,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([FiniteLogits(), chance]),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        do_sample=False,  # what the processor leaves is drawn already
        num_beams=1,
        repetition_penalty=1.0,  # a checkpoint may ask for one, and the policy would not be the model
        synced_gpus=together,
    )
    rows = ids_RL.tolist()
    ends = [answer_end(row, tokenizer, stop) for row in rows]
    lengths = [len(row) if end is None else end for row, end in zip(rows, ends, strict=True)]
    there_RL = torch.arange(len(chance.log_probs)) < torch.tensor(lengths)[:, None]
    there_RL = there_RL.to(ids_RL.device)
    return Answers(
        ids=[row[:length] for row, length in zip(rows, lengths, strict=True)],
        finished=[end is not None for end in ends],
        log_probs=torch.stack(chance.log_probs, dim=1)[there_RL],
        entropies=torch.stack(chance.entropies, dim=1)[there_RL],
    )


def answer_end(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop: dict[str, Any]) -> int | None:
    """How many tokens of a row are its answer, with its end; None where there is no end."""
    ended = [place + 1 for place, token in enumerate(ids) if token == stop["eos_token_id"]]
    for mark in stop.get("stop_strings", ()):
        texts = (tokenizer.decode([*ids[:length]]) for length in range(1, len(ids) + 1))
        ended += itertools.islice((length for length, text in enumerate(texts, start=1) if mark in text), 1)
    return min(ended, default=None)
