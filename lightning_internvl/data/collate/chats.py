"""Samples to batches of tensors. Masks come from lengths, never from token ids."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.bad_samples import Unwanted
from lightning_internvl.data.collate.base import (
    Prepared,
    Sample,
    pad_id,
    pad_rows,
    picture_keys,
    sizes_of,
    tiles_of,
    video_of,
)
from lightning_internvl.data.collate.encode import ImageTokens, TooLong, certainly_fits, encode_conversation, encode_prompt
from lightning_internvl.data.collate.instructions import Instructions, encode_question
from lightning_internvl.data.collate.pairs_of_answers import COPIES, longest_row, pair_key, with_rejected
from lightning_internvl.data.collate.pixel_boxes import WHOLE, in_pixels, rescaled
from lightning_internvl.data.collate.timestamps import with_times
from lightning_internvl.data.collate.video_frames import FrameLimits, with_frames
from lightning_internvl.data.processors.basic import Processor, Size
from lightning_internvl.data.templates import IMAGE, VIDEO, ChatTemplate, Message
from lightning_internvl.data.tokenizer import stop_options, token_id
from lightning_internvl.messages import check_choice

PAIR_TASKS = ("itc", "itm", "itg")
TOO_LONG = ("cut", "skip")


class ChatCollator:
    """Conversations about pictures to a batch for next-token prediction.

    Takes samples {"images": [(H, W, 3) uint8 of any size, ...], "conversation", "key"[, "draw"]}.
    Gives `input_ids`, `attention_mask` and `labels` (B, longest row) int64, `pixel_values` (N, 3,
    S, S) float32 with the N tiles of all pictures of all samples in order, `image_counts` (B,)
    int64, the pictures of each sample, `right_padded` (no padding stands before a token), and
    `keys`. A picture of n tiles has n * `tokens_per_tile` placeholders. A batch without pictures
    has `pixel_values` of shape (0, 3, S, S). A processor of any resolution gives other inputs
    (`Processor.inputs`) and counts its placeholders itself.
    Raises ValueError naming the sample for what `encode_conversation` refuses.

    Where `image_tokens` names a token of videos, samples may hold "videos": [((F, H, W, 3) uint8,
    frames a second), ...], marked "<video>" in the conversation, and the batch has
    `pixel_values_videos`, what else describes pictures (`video_grid_thw`), and `second_per_grid_ts`
    (videos,) float32, the seconds between two steps of each (`Processor.step_seconds`). With
    `video_frames` videos are pictures of one square each (see `with_frames`).

    Args:
        tokens_per_tile: decoder tokens of one square.
        max_length: tokens of a row, text and pictures together.
        image_tokens: names of the placeholder and of the tokens around a picture; None: as the
            template has them.
        split_answers: for an encoder-decoder: a row ends before the last answer, which alone makes
            the row's labels.
        instructions: adds what an instructed middleware reads, a row for every square.
        too_long: what becomes of a conversation over `max_length`: "cut" leaves whole turns at its
            end out, "skip" refuses it.
        video_frames: the least and the most frames of a video, where they are shown as pictures.
        preferences: whether a sample has a "rejected" answer in place of its last one. A batch has
            first the rows of all conversations and then the same rows with those answers; pictures
            are there once, for both (`copies`, 2), and `pair_keys` name each pair by its content.
    """

    picture_keys = False  # whether batches name their pictures (see `feature_cache`)
    quick_check = True  # whether the length is all that `check` has to look at

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
        video_frames: Sequence[int] | None = None,
        preferences: bool = False,
    ) -> None:
        check_choice("too_long", too_long, TOO_LONG)
        self.preferences, self.copies = preferences, 2 if preferences else 1
        self.video_frames = None if video_frames is None else FrameLimits.of(video_frames)
        self.tokenizer, self.template, self.processor = tokenizer, template, processor
        self.split_answers = split_answers
        self.encode = encode_question if split_answers else encode_conversation
        self.instructions, self.too_long = instructions, too_long
        self.tokens_per_tile, self.max_length = tokens_per_tile, max_length
        # The most that a row of a batch has
        self.row_length, self.blank_tiles = max_length, processor.max_tiles
        start, end = template.image_frame or (None, None)
        self.image_tokens = image_tokens or ImageTokens(start=start, end=end)
        if self.video_frames and self.image_tokens.video is not None:
            both = f"data.chats_collate.video_frames={list(self.video_frames)}, and a token of their own"
            raise ValueError(f"videos have {both}, data.video_token={self.image_tokens.video}; set one of them to null")

    @property
    def reads_videos(self) -> bool:
        """Whether samples may hold videos."""
        return bool(self.video_frames) or self.image_tokens.video is not None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.stack([self.prepare(sample) for sample in samples])

    def prepare(self, sample: Sample) -> Prepared:
        """Tiles, ids and labels of one conversation. Raises ValueError naming the sample."""
        sample = self._with_frames(sample)
        prepared = self._prepared(sample, self.encode)
        if self.preferences:
            shown, other = (prepared["pictures"], prepared["videos"]), with_rejected(sample)
            prepared["rejected"] = self._row({**other, "conversation": self._read(other, *shown)}, *shown, self.encode)
            prepared["pair_key"] = pair_key(prepared)
        return prepared

    def rows(self, prepared: Sequence[Prepared]) -> list[Any]:
        """The rows of prepared samples; those with rejected answers come behind all others."""
        return [one[name] for name in ("row", *(["rejected"] if self.preferences else [])) for one in prepared]

    def check(self, sample: Sample) -> int | None:
        """How many tokens a sample has if `prepare` leaves its last turns out, None if it takes the
        whole. Quick for what has room to spare. Raises ValueError as `prepare` does."""
        sample = self._with_frames(sample)
        if self.quick_check and self.encode is encode_conversation and not self.preferences:
            shown = self._shown(sample, self.encode)
            lengths = self._lengths(*shown, sizes_of(sample))
            names, limit = self.image_tokens, self.max_length
            row = (self._read(sample, *shown), self.template, self.tokenizer, lengths[0], limit, sample["key"])
            if certainly_fits(*row, names, lengths[1]):
                return None
        whole = copy.copy(self)
        whole.max_length = whole.row_length = sys.maxsize
        tokens = longest_row(whole.prepare(sample))
        if tokens <= self.max_length:
            return None
        self.prepare(sample)
        return tokens

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared conversations."""
        rows = self.rows(prepared)
        input_ids, mask = pad_rows([ids for ids, _ in rows], pad_id(self.tokenizer))
        labels, _ = pad_rows([labels for _, labels in rows], IGNORE_INDEX)
        return {
            "keys": [one["key"] for one in prepared],
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "right_padded": True,
            **self._inputs(prepared),
            **picture_keys(prepared, self.picture_keys),
            **self._pairs(prepared),
            "image_counts": torch.tensor([len(one["pictures"]) for one in prepared]),
        }

    def _pairs(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """What a batch of preferences has beside its rows."""
        return {COPIES: 2, "pair_keys": [one["pair_key"] for one in prepared]} if self.preferences else {}

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """What to generate from, given samples whose conversations end with a user message:
        `input_ids` and `attention_mask`, padded on the left so that all rows end where the answer
        begins, and the pictures and videos."""
        prepared = [self._prepared(sample, encode_prompt) for sample in samples]
        ids, mask = pad_rows([one["row"][::-1] for one in prepared], pad_id(self.tokenizer))
        return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), **self._inputs(prepared)}

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The largest batch that a step can meet, without data: rows of `max_length`, one picture
        of the most tiles in each."""
        names = self.image_tokens
        before = [names.start] if names.start else []
        after = [names.end] if names.end else []
        room = self.row_length - len(before + after) - 1
        tiles = min(self.blank_tiles, room // self.tokens_per_tile)
        start, context, end = ([token_id(self.tokenizer, word) for word in words] for words in (before, [names.context], after))
        run = [*start, *context * (tiles * self.tokens_per_tile), *end]
        text = [pad_id(self.tokenizer)] * (self.row_length - len(run))
        rows = run + text, [IGNORE_INDEX] * len(run) + text
        ids, labels = (torch.tensor(row, device=device).repeat(batch_size * self.copies, 1) for row in rows)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            **self.processor.blank(batch_size * tiles, device),
            **(self.instructions.blank(batch_size * tiles, device) if self.instructions else {}),
            "image_counts": torch.ones(batch_size, dtype=torch.int64, device=device),
            **({COPIES: self.copies} if self.copies > 1 else {}),
        }

    def _prepared(self, sample: Sample, encode: Callable[..., Any]) -> Prepared:
        """A sample's row by `encode`, and its pictures and videos as the encoder sees them."""
        sample = self._with_frames(sample)
        pictures, videos = self._shown(sample, encode)
        conversation = self._read(sample, pictures, videos)
        row = self._row({**sample, "conversation": conversation}, pictures, videos, encode)
        seconds = [self.processor.step_seconds(len(frames), fps) for frames, fps in sample.get("videos", ())]
        shown = {"pictures": pictures, "sizes": sizes_of(sample), "videos": videos, "seconds": seconds}
        return {"key": sample["key"], "row": row, **shown, "conversation": conversation}

    def _with_frames(self, sample: Sample) -> Sample:
        """A sample with pictures in place of its videos, where frames are pictures; one that has them
        as it is."""
        if self.video_frames is None or "frames" in sample:
            return sample
        return with_frames(sample, self.video_frames, self.template)

    def _read(self, sample: Sample, pictures: Sequence[np.ndarray], videos: Sequence[np.ndarray]) -> Sequence[Message]:
        """The conversation as the model reads it."""
        conversation = sample["conversation"]
        if self.template.pixel_boxes:
            conversation = in_pixels(conversation, *([one.shape[1:3] for one in shown] for shown in (pictures, videos)))
        if self.template.timestamps and self.image_tokens.video is not None:
            times = [self.processor.step_times(len(frames), fps) for frames, fps in sample.get("videos", ())]
            conversation = with_times(conversation, times, sample["key"])
        return conversation

    def said(self, text: str, sample: Sample, finished: bool = True) -> str:
        """An answer to a sample's last question, decoded without special tokens, as data has it: see
        `ChatTemplate.said`; boxes are in 0..1000."""
        return self.said_in(text, self.box_frame(sample) if "</box>" in text else None, finished)

    def said_in(self, text: str, frame: Size | None, finished: bool = True) -> str:
        """The same, where boxes count the pixels of a frame; None: they are in 0..1000."""
        text = self.template.said(text, finished)
        return text if frame is None else rescaled(text, frame, WHOLE)

    def box_frame(self, sample: Sample) -> Size | None:
        """Height and width of what the last question of a sample shows, in whose pixels boxes of the
        answer are; None where they are in 0..1000."""
        if not self.template.pixel_boxes:
            return None
        marks = "".join(message["content"] for message in sample["conversation"])
        if marks.rfind(VIDEO) > marks.rfind(IMAGE):
            _, height, width, _ = self.processor.video(*sample["videos"][-1]).shape
        elif len(sample["images"]):
            _, height, width, *_ = self.processor.shape(*sample["images"][-1].shape[:2])
        else:
            return None
        return height, width

    def stop_options(self) -> dict[str, Any]:
        """Options of `generate` that end an answer."""
        return stop_options(self.tokenizer, self.template.end(self.tokenizer.eos_token))

    def decoded(self, ids: Any) -> list[str]:
        """Answers (B rows of ids) without special tokens and their end."""
        texts, marks = self.tokenizer.batch_decode(ids, skip_special_tokens=True), self.stop_options().get("stop_strings", ())
        for mark in marks:
            texts = [text.partition(mark)[0] for text in texts]
        return [text.strip() for text in texts]

    def _shown(self, sample: Sample, encode: Callable[..., Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """A sample's pictures and videos as the encoder sees them."""
        key = sample["key"]
        frames = sample.get("frames", frozenset())
        # Training shares the limit of tiles among the pictures of a record; a question does not
        pictured = len(sample["images"]) - len(frames)
        processor = self.processor.asked(pictured) if encode is encode_prompt else self.processor.shared(pictured)
        pictures = [
            tiles_of(self.processor.whole(), x, key)
            if i in frames
            else tiles_of(processor, x, key, [*sample["draw"], i] if "draw" in sample else None)
            for i, x in enumerate(sample["images"])
        ]
        return pictures, [video_of(self.processor, x, fps, key) for x, fps in sample.get("videos", ())]

    def _inputs(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        """What the encoder reads of all pictures and videos."""
        pictures = [picture for one in prepared for picture in one["pictures"]]
        inputs = self.processor.inputs(pictures, [size for one in prepared for size in one["sizes"]])
        if self.instructions:
            inputs |= self.instructions(prepared, [sum(len(picture) for picture in one["pictures"]) for one in prepared])
        if self.image_tokens.video is not None:
            named = {"pixel_values": "pixel_values_videos"}
            videos = self.processor.inputs([video for one in prepared for video in one["videos"]])
            inputs |= {named.get(n, n.replace("image_", "video_", 1)): x for n, x in videos.items()}
            if self.processor.timed:
                inputs["second_per_grid_ts"] = torch.tensor([step for one in prepared for step in one["seconds"]])
        return inputs

    def _lengths(
        self, pictures: Sequence[np.ndarray], videos: Sequence[np.ndarray], sizes: Sequence[Size]
    ) -> tuple[list[int], list[int]]:
        """Visual tokens of each picture, and of each video, or step of one, that has a mark."""
        pairs = zip(pictures, sizes, strict=True)
        lengths = [self.processor.tokens(one, self.tokens_per_tile, size) for one, size in pairs]
        films = [self.processor.tokens(video, self.tokens_per_tile) for video in videos]
        if self.template.timestamps:
            steps = [self.processor.steps(video) for video in videos]
            films = [total // count for total, count in zip(films, steps, strict=True) for _ in range(count)]
        return lengths, films

    def _row(self, sample: Sample, pictures: list[np.ndarray], videos: list[np.ndarray], encode: Callable[..., Any]) -> Any:
        lengths, video_lengths = self._lengths(pictures, videos, sizes_of(sample))
        conversation, key = sample["conversation"], sample["key"]
        skips = self.too_long == "skip" and encode is not encode_prompt
        limit = sys.maxsize if skips else self.max_length
        try:
            row = encode(conversation, self.template, self.tokenizer, lengths, limit, key, self.image_tokens, video_lengths)
        except TooLong as error:
            counts = " + ".join(str(len(x)) for x in [*pictures, *videos]) or "no"
            fewer = f", or lower data.processor.{self.processor.limit}" if self.processor.limit else ""
            raise TooLong(
                f"{error} ({counts} tiles of {self.tokens_per_tile}); raise data.chats_collate.max_length{fewer}"
            ) from error
        if skips and (longest := max(map(len, row))) > self.max_length:
            more = f"{longest} tokens, more than {self.max_length}"
            raise Unwanted(f"sample {key}: it has {more}, and data.too_long is skip")
        return row
