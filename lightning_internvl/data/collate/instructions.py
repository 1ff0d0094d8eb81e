"""What an encoder-decoder and an instructed middleware need of a conversation beside the usual row.

Source: InstructBLIP (Dai et al. 2023, section 2.3); LAVIS `blip2_vicuna_instruct.py`,
`blip2_t5.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_internvl.data.collate.base import pad_rows
from lightning_internvl.data.collate.encode import IMAGE_TOKENS, ImageTokens, TooLong, continuation_ids, encode_prompt
from lightning_internvl.data.templates import IMAGE, ChatTemplate, Message


class Instructions:
    """The text of the user's messages for each picture, as an instructed Q-Former reads.

    A row is the first token (that of classification, where the tokenizer has one), the text, and
    the end token. A text that is too long loses its beginning.

    Args:
        max_length: tokens of a row, the first and the last one counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> None:
        if max_length < 3:
            raise ValueError(f"an instruction needs 3 or more tokens: {max_length=}")
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, samples: Sequence[Mapping[str, Any]], squares: Sequence[int]) -> dict[str, Tensor]:
        """`qformer_input_ids` and `qformer_attention_mask` (N, L), one row for each of the N
        squares of the samples' pictures.

        Args:
            squares: how many of them each sample has.
        """
        rows = [self.row(sample["conversation"]) for sample in samples]
        ids, mask = pad_rows(rows, self.tokenizer.pad_token_id or 0)
        repeats = torch.tensor(squares)
        return {
            "qformer_input_ids": ids.repeat_interleave(repeats, dim=0),
            "qformer_attention_mask": mask.repeat_interleave(repeats, dim=0),
        }

    def row(self, conversation: Sequence[Message]) -> list[int]:
        """Ids of one conversation's instruction."""
        asked = [message["content"] for message in conversation if message["role"] == "user"]
        texts = [text.replace(IMAGE, " ").strip() for text in asked]
        tokenizer = self.tokenizer
        ids = continuation_ids(tokenizer, " ".join(filter(None, texts)))
        first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        before = [] if first is None else [first]
        room = self.max_length - len(before) - 1
        return [*before, *ids[max(0, len(ids) - room) :], tokenizer.eos_token_id]

    def blank(self, pictures: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The longest rows, without data."""
        ids = torch.zeros(pictures, self.max_length, dtype=torch.int64, device=device)
        return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def encode_question(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    image_lengths: Sequence[int],
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
    video_lengths: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """A conversation for an encoder-decoder: ids of all that stands before the last answer, and ids
    of that answer with its end.

    Raises TooLong naming `sample` when either is over `max_length`, and ValueError for a malformed
    conversation.
    """
    # The last answer that is learnt is the one to write
    while len(turns) > 2 and turns[-1]["role"] == "assistant" and not turns[-1].get("learnt", True):
        turns = turns[:-2]
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise ValueError(f"sample {sample}: the conversation must end with an answer of the assistant")
    prompt = encode_prompt(turns[:-1], template, tokenizer, image_lengths, max_length, sample, image_tokens, video_lengths)
    segments = template.segments(turns, tokenizer.eos_token or "")
    answer = [segment for segment in segments if segment.is_answer][-1]
    ids = continuation_ids(tokenizer, answer.text)
    if len(ids) > max_length:
        raise TooLong(f"sample {sample}: its answer has {len(ids)} tokens, more than max_length={max_length}")
    return prompt, ids
