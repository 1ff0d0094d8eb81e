"""Samples to batches of tensors. Masks come from lengths, never from token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_internvl.data.encode import IGNORE, IMAGE_TOKENS, ImageTokens, continuation_ids, encode_conversation
from lightning_internvl.data.templates import IMAGE, ChatTemplate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PAIR_TASKS = ("itc", "itm", "itg")

Sample = Mapping[str, Any]


def to_pixels(images: np.ndarray | Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Normalise (B, H, W, 3) uint8 to (B, 3, H, W) float32: (value / 255 - mean) / std per channel."""
    images = torch.as_tensor(images)
    means, stds = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return images.permute(0, 3, 1, 2).contiguous().float().mul_(1 / (255 * stds)).sub_(means / stds)


def stack_images(images: Sequence[np.ndarray], keys: Sequence[str]) -> np.ndarray:
    """Stack (H, W, 3) uint8 images to (B, H, W, 3). Raises ValueError naming samples when their sizes differ."""
    for image, key in zip(images, keys, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(f"sample {key}: image shape {image.shape} differs from {images[0].shape} of {keys[0]}")
    return np.stack(images)


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad to the longest row: (B, L) int64 filled up with `value`, and its (B, L) int64 mask (1: real)."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    padded = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return padded, mask.long()


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id does for padding, because the masks come from lengths."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class PairCollator:
    """Image-caption pairs to a batch for contrastive (itc), matching (itm) and generative (itg) objectives.

    Takes samples {"image": (H, W, 3) uint8, "caption", "language", "key"}. Gives `pixel_values` (B, 3, H, W) float32,
    `keys`, and for each task `<task>_ids` and `<task>_mask`, int64, (B, longest row):
    itc: bos, prompt, " " + caption, eos; itm: bos, caption, eos; itg: bos, prompt of the language, " " + caption, eos,
    with `itg_labels`, -100 on padding, bos and the prompt but its last token, as in the published collator.
    A caption over `max_length` loses its end, never its eos. Raises ValueError for an empty caption, naming the sample.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 48,
        itc_prompt: str = "summarize:",
        caption_prompts: Mapping[str, str] | None = None,
        tasks: Sequence[str] = PAIR_TASKS,
    ) -> None:
        if unknown := set(tasks) - set(PAIR_TASKS):
            raise ValueError(f"unknown tasks {sorted(unknown)}; choose from {list(PAIR_TASKS)}")
        self.tokenizer, self.max_length, self.tasks = tokenizer, max_length, tuple(tasks)
        self.itc_prompt = itc_prompt
        self.caption_prompts = dict(caption_prompts or {"en": "English caption:", "zh": "Chinese caption:"})

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        keys = [sample["key"] for sample in samples]
        images = stack_images([sample["image"] for sample in samples], keys)
        batch: dict[str, Any] = {"keys": keys, "pixel_values": to_pixels(images)}
        for task in self.tasks:
            prompts = [self._prompt(sample, task) for sample in samples]
            rows = [self._row(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
            batch[f"{task}_ids"], batch[f"{task}_mask"] = pad_rows(rows, _pad_id(self.tokenizer))
            if task == "itg":
                hidden = [max(1, len(prompt) - 1) for prompt in prompts]
                labels = [[IGNORE] * n + row[n:] for n, row in zip(hidden, rows, strict=True)]
                batch["itg_labels"], _ = pad_rows(labels, IGNORE)
        return batch

    def rows(self, task: str, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token rows of bare captions for itc or itm, and the id to pad them with: the arguments of `pad_rows`."""
        samples = [{"caption": caption, "key": caption} for caption in captions]
        return [self._row(self._prompt(sample, task), sample) for sample in samples], _pad_id(self.tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """bos and a prompt, from which a caption is generated."""
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + continuation_ids(self.tokenizer, prompt)

    def _prompt(self, sample: Sample, task: str) -> list[int]:
        if task != "itg":
            return self.prompt_ids(self.itc_prompt if task == "itc" else "")
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
        follows_text = prompt and prompt[-1] != self.tokenizer.bos_token_id
        ids = continuation_ids(self.tokenizer, f" {caption}" if follows_text else caption)
        room = self.max_length - len(prompt) - 1
        if room < 1:
            raise ValueError(f"max_length={self.max_length} leaves no room for a caption after {len(prompt)} tokens")
        return [*prompt, *ids[:room], self.tokenizer.eos_token_id]


class ChatCollator:
    """Conversations about pictures to a batch for next-token prediction.

    Takes samples {"images": [(H, W, 3) uint8, ...], "conversation", "key"}. Gives `input_ids`, `attention_mask` and
    `labels` (B, longest row) int64, `pixel_values` (N, 3, H, W) float32 with the N pictures of all samples in order,
    `image_counts` (B,) int64 and `keys`. A batch without pictures has `pixel_values` of shape (0, 3, S, S), S being
    `image_size`. Raises ValueError naming the sample where pictures and "<image>" marks differ in number, and for
    what `encode_conversation` refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        visual_tokens: int,
        max_length: int,
        image_size: int = 64,
        image_tokens: ImageTokens = IMAGE_TOKENS,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.visual_tokens, self.max_length = visual_tokens, max_length
        self.image_size, self.image_tokens = image_size, image_tokens

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        rows = [self._encode(sample) for sample in samples]
        input_ids, mask = pad_rows([ids for ids, _ in rows], _pad_id(self.tokenizer))
        labels, _ = pad_rows([labels for _, labels in rows], IGNORE)
        images = [image for sample in samples for image in sample["images"]]
        owners = [sample["key"] for sample in samples for _ in sample["images"]]
        empty = np.zeros((0, self.image_size, self.image_size, 3), dtype=np.uint8)
        return {
            "keys": [sample["key"] for sample in samples],
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": to_pixels(stack_images(images, owners) if images else empty),
            "image_counts": torch.tensor([len(sample["images"]) for sample in samples]),
        }

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        marks = sum(message["content"].count(IMAGE) for message in sample["conversation"])
        if marks != len(sample["images"]):
            raise ValueError(f"sample {sample['key']}: {len(sample['images'])} pictures but {marks} {IMAGE!r} marks")
        return encode_conversation(
            sample["conversation"],
            self.template,
            self.tokenizer,
            self.visual_tokens,
            self.max_length,
            sample["key"],
            self.image_tokens,
        )
