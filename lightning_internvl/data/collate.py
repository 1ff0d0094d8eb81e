"""Samples to batches of tensors. Masks come from lengths, never from token ids."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_internvl.data.collation import (
    Prepared,
    Sample,
    pad_id,
    pad_rows,
    picture_keys,
    pixels_of,
    stable_id,
    tiles_of,
    video_of,
)
from lightning_internvl.data.encode import (
    IGNORE,
    ImageTokens,
    TooLong,
    continuation_ids,
    encode_conversation,
    encode_prompt,
    token_id,
)
from lightning_internvl.data.instructions import Instructions, encode_question
from lightning_internvl.data.ledger import Unwanted
from lightning_internvl.data.processors import Processor
from lightning_internvl.data.templates import ChatTemplate

PAIR_TASKS = ("itc", "itm", "itg")
TOO_LONG = ("cut", "skip")


class PairCollator:
    """Image-caption pairs to a batch for contrastive (itc), matching (itm) and generative (itg) objectives.

    Takes samples {"image": (H, W, 3) uint8 of any size, "caption", "language", "key"[, "image_id"][, "draw"]}. Gives
    `pixel_values` (B, 3, S, S) float32, `image_ids` (B,) int64 (equal where `image_id`, by default the key, is), `keys`, and for
    each task `<task>_ids` and `<task>_mask`, int64, (B, longest row):
    itc: bos, prompt, " " + caption, eos; itm: bos, caption, eos; itg: bos, prompt of the language, " " + caption, eos,
    where itc and itm begin with the token of classification instead if the tokenizer has one (BERT),
    with `itg_labels`, -100 on padding, bos and the prompt but its last token, as in the published collator.
    A caption over `max_length` loses its end, never its eos. Raises ValueError for an empty caption, naming the sample, and
    for a processor that gives several tiles a picture.
    """

    picture_keys = False  # whether batches name their pictures (see `feature_cache`)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: Processor,
        max_length: int = 48,
        itc_prompt: str = "summarize:",
        caption_prompts: Mapping[str, str] | None = None,
        tasks: Sequence[str] = PAIR_TASKS,
    ) -> None:
        if unknown := set(tasks) - set(PAIR_TASKS):
            raise ValueError(f"unknown tasks {sorted(unknown)}; choose from {list(PAIR_TASKS)}")
        if processor.max_tiles != 1:
            raise ValueError(f"pairs need one square a picture, the processor gives up to {processor.max_tiles}; use its whole()")
        self.tokenizer, self.processor, self.max_length, self.tasks = tokenizer, processor, max_length, tuple(tasks)
        self.itc_prompt = itc_prompt
        self.caption_prompts = dict(caption_prompts or {"en": "English caption:", "zh": "Chinese caption:"})

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.stack([self.prepare(sample) for sample in samples])

    def prepare(self, sample: Sample) -> Prepared:
        """The square of one picture and the token rows of its caption. Raises ValueError naming the sample."""
        key = sample["key"]
        found: Prepared = {
            "key": key,
            "image_id": stable_id(sample.get("image_id", key)),
            "tiles": tiles_of(self.processor, sample["image"], key, sample.get("draw")),
        }
        for task in self.tasks:
            prompt = self._prompt(sample, task)
            found[task] = self._row(prompt, sample)
            if task == "itg":
                hidden = max(1, len(prompt) - 1)
                found["itg_labels"] = [IGNORE] * hidden + found[task][hidden:]
        return found

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared pairs."""
        batch: dict[str, Any] = {
            "keys": [one["key"] for one in prepared],
            "pixel_values": pixels_of(self.processor, [one["tiles"] for one in prepared]),
            **picture_keys(prepared, self.picture_keys),
            "image_ids": torch.tensor([one["image_id"] for one in prepared]),
        }
        for task in self.tasks:
            batch[f"{task}_ids"], batch[f"{task}_mask"] = pad_rows([one[task] for one in prepared], pad_id(self.tokenizer))
            if task == "itg":
                batch["itg_labels"], _ = pad_rows([one["itg_labels"] for one in prepared], IGNORE)
        return batch

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The largest batch that a step can meet, without data: what the memory of a step is measured with."""
        side = self.processor.image_size
        batch = {
            "pixel_values": torch.zeros(batch_size, 3, side, side, device=device),
            "image_ids": torch.arange(batch_size, device=device),
        }
        rows = {"dtype": torch.int64, "device": device}
        for task in self.tasks:
            batch[f"{task}_ids"] = torch.zeros(batch_size, self.max_length, **rows)
            batch[f"{task}_mask"] = torch.ones(batch_size, self.max_length, **rows)
            if task == "itg":
                batch["itg_labels"] = torch.zeros(batch_size, self.max_length, **rows)
        return batch

    def pixels(
        self, images: Sequence[np.ndarray], keys: Sequence[str], draws: Sequence[Sequence[int] | None] | None = None
    ) -> Tensor:
        """Pictures of any size to (B, 3, S, S) float32; `draws` fixes the chance of each (see `Processor`)."""
        found = zip(images, keys, draws or [None] * len(images), strict=True)
        return pixels_of(self.processor, [tiles_of(self.processor, image, key, draw) for image, key, draw in found])

    def rows(self, task: str, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token rows of bare captions for itc or itm, and the id to pad them with: the arguments of `pad_rows`."""
        samples = [{"caption": caption, "key": caption} for caption in captions]
        return [self._row(self._prompt(sample, task), sample) for sample in samples], pad_id(self.tokenizer)

    def prompt_ids(self, prompt: str, first: int | None = None) -> list[int]:
        """bos, or another first token, and a prompt, from which a caption is generated."""
        first = self.tokenizer.bos_token_id if first is None else first
        return ([] if first is None else [first]) + continuation_ids(self.tokenizer, prompt)

    def _prompt(self, sample: Sample, task: str) -> list[int]:
        if task != "itg":
            return self.prompt_ids(self.itc_prompt if task == "itc" else "", self.tokenizer.cls_token_id)
        language = sample.get("language", "en")
        if language not in self.caption_prompts:
            raise ValueError(
                f"sample {sample['key']}: no caption prompt for language {language!r}; choose from {sorted(self.caption_prompts)}"
            )
        return self.prompt_ids(self.caption_prompts[language])

    def _row(self, prompt: list[int], sample: Sample) -> list[int]:
        caption = sample["caption"].strip()
        if not caption:
            raise ValueError(f"sample {sample['key']}: its caption is empty")
        follows_text = prompt and prompt[-1] not in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        ids = continuation_ids(self.tokenizer, f" {caption}" if follows_text else caption)
        room = self.max_length - len(prompt) - 1
        if room < 1:
            raise ValueError(f"max_length={self.max_length} leaves no room for a caption after {len(prompt)} tokens")
        return [*prompt, *ids[:room], self.tokenizer.eos_token_id]


class ChatCollator:
    """Conversations about pictures to a batch for next-token prediction.

    Takes samples {"images": [(H, W, 3) uint8 of any size, ...], "conversation", "key"[, "draw"]}. Gives `input_ids`,
    `attention_mask` and `labels` (B, longest row) int64, `pixel_values` (N, 3, S, S) float32 with the N tiles of all pictures of
    all samples in order, `image_counts` (B,) int64, the pictures of each sample, and `keys`. A picture of n tiles has
    n * `tokens_per_tile` placeholders. A batch without pictures has `pixel_values` of shape (0, 3, S, S). A processor of any
    resolution gives other inputs (`Processor.inputs`) and counts its placeholders itself. Raises ValueError naming the sample for
    what `encode_conversation` refuses.

    Where `image_tokens` names a token of videos, samples may hold "videos": [((F, H, W, 3) uint8, frames a second), ...], marked
    "<video>" in the conversation, and the batch has `pixel_values_videos` and what else describes pictures (`video_grid_thw`).

    Args:
        tokens_per_tile: decoder tokens of one square.
        max_length: tokens of a row, text and pictures together.
        image_tokens: names of the placeholder and of the tokens around a picture; None: as the template has them.
        split_answers: for an encoder-decoder: a row ends before the last answer, which alone makes the row's labels.
        instructions: adds what an instructed middleware reads, a row for every square.
        too_long: what becomes of a conversation over `max_length`: "cut" leaves whole turns at its end out, "skip" refuses it.
    """

    picture_keys = False  # whether batches name their pictures (see `feature_cache`)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        processor: Processor,
        tokens_per_tile: int,
        max_length: int,
        image_tokens: ImageTokens | None = None,
        split_answers: bool = False,
        instructions: Instructions | None = None,
        too_long: str = "cut",
    ) -> None:
        if too_long not in TOO_LONG:
            raise ValueError(f"{too_long=} is not known; valid choices: {', '.join(TOO_LONG)}")
        self.tokenizer, self.template, self.processor = tokenizer, template, processor
        self.split_answers, self.encode = split_answers, encode_question if split_answers else encode_conversation
        self.instructions, self.too_long = instructions, too_long
        self.tokens_per_tile, self.max_length = tokens_per_tile, max_length
        self.row_length, self.blank_tiles = max_length, processor.max_tiles  # the most that a row of a batch has
        start, end = template.image_frame or (None, None)
        self.image_tokens = image_tokens or ImageTokens(start=start, end=end)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.stack([self.prepare(sample) for sample in samples])

    def prepare(self, sample: Sample) -> Prepared:
        """Tiles, ids and labels of one conversation. Raises ValueError naming the sample."""
        return self._prepared(sample, self.encode)

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared conversations."""
        input_ids, mask = pad_rows([one["row"][0] for one in prepared], pad_id(self.tokenizer))
        labels, _ = pad_rows([one["row"][1] for one in prepared], IGNORE)
        return {
            "keys": [one["key"] for one in prepared],
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            **self._inputs(prepared),
            **picture_keys(prepared, self.picture_keys),
            "image_counts": torch.tensor([len(one["pictures"]) for one in prepared]),
        }

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """What to generate from, given samples whose conversations end with a user message: `input_ids` and `attention_mask`,
        padded on the left so that all rows end where the answer begins, and the pictures and videos."""
        prepared = [self._prepared(sample, encode_prompt) for sample in samples]
        ids, mask = pad_rows([one["row"][::-1] for one in prepared], pad_id(self.tokenizer))
        return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), **self._inputs(prepared)}

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The largest batch that a step can meet, without data: rows of `max_length`, one picture of the most tiles in each."""
        names = self.image_tokens
        before = [names.start] if names.start else []
        after = [names.end] if names.end else []
        tiles = min(self.blank_tiles, (self.row_length - len(before + after) - 1) // self.tokens_per_tile)
        run = [token_id(self.tokenizer, t) for t in [*before, *[names.context] * (tiles * self.tokens_per_tile), *after]]
        text = [pad_id(self.tokenizer)] * (self.row_length - len(run))
        ids, labels = (torch.tensor(row, device=device).repeat(batch_size, 1) for row in (run + text, [IGNORE] * len(run) + text))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            **self.processor.blank(batch_size * tiles, device),
            **(self.instructions.blank(batch_size * tiles, device) if self.instructions else {}),
            "image_counts": torch.ones(batch_size, dtype=torch.int64, device=device),
        }

    def _prepared(self, sample: Sample, encode: Callable[..., Any]) -> Prepared:
        """A sample's row by `encode`, and its pictures and videos as the encoder sees them."""
        key = sample["key"]
        pictures = [
            tiles_of(self.processor, image, key, [*sample["draw"], place] if "draw" in sample else None)
            for place, image in enumerate(sample["images"])
        ]
        videos = [video_of(self.processor, video, fps, key) for video, fps in sample.get("videos", ())]
        row = self._row(sample, pictures, videos, encode)
        return {"key": key, "row": row, "pictures": pictures, "videos": videos, "conversation": sample["conversation"]}

    def _inputs(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        """What the encoder reads of all pictures and videos."""
        inputs = self.processor.inputs([picture for one in prepared for picture in one["pictures"]])
        if self.instructions:
            inputs |= self.instructions(prepared, [sum(len(picture) for picture in one["pictures"]) for one in prepared])
        if self.image_tokens.video is not None:
            named = {"pixel_values": "pixel_values_videos"}
            videos = self.processor.inputs([video for one in prepared for video in one["videos"]])
            inputs |= {named.get(n, n.replace("image_", "video_", 1)): x for n, x in videos.items()}
        return inputs

    def _row(self, sample: Sample, pictures: list[np.ndarray], videos: list[np.ndarray], encode: Callable[..., Any]) -> Any:
        lengths, video_lengths = ([self.processor.tokens(x, self.tokens_per_tile) for x in xs] for xs in (pictures, videos))
        conversation, key = sample["conversation"], sample["key"]
        skips = self.too_long == "skip" and encode is not encode_prompt
        limit = sys.maxsize if skips else self.max_length
        try:
            row = encode(conversation, self.template, self.tokenizer, lengths, limit, key, self.image_tokens, video_lengths)
        except TooLong as error:
            counts = " + ".join(str(len(x)) for x in [*pictures, *videos]) or "no"
            raise TooLong(
                f"{error} ({counts} tiles of {self.tokens_per_tile}); raise data.chats_collate.max_length, or lower "
                f"data.processor.{self.processor.limit}"
            ) from error
        if skips and (longest := max(map(len, row))) > self.max_length:
            raise Unwanted(f"sample {key}: it has {longest} tokens, more than {self.max_length}, and data.too_long is skip")
        return row
