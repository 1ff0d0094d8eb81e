"""Batches of pictures and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.collate import base
from lightning_internvl.data.collate.base import Prepared, Sample, pad_id, pad_rows, stable_id
from lightning_internvl.data.collate.chats import PAIR_TASKS
from lightning_internvl.data.collate.encode import continuation_ids
from lightning_internvl.data.processors.basic import Processor

SETTING = "data.pairs_collate.caption_prompts"
OTHER = "other"  # the prompt of languages that have none of their own


class PairCollator(base.SquareReader):
    """Pairs to a batch for contrastive (itc), matching (itm) and generative (itg) objectives.

    Takes samples {"image": (H, W, 3) uint8 of any size, "caption", "language", "key"[,
    "image_id"][, "draw"]}. Gives `pixel_values` (B, 3, S, S) float32, `image_ids` (B,) int64 (equal
    where `image_id`, by default the key, is), `pair_ids` (equal where the caption is too), `keys`,
    and for each task `<task>_ids` and `<task>_mask`, int64, (B, longest row): itc: bos, prompt, " "
    + caption, eos; itm: bos, caption, eos; itg: bos, prompt of the language, " " + caption, eos,
    where itc and itm begin with the token of classification instead if the tokenizer has one
    (BERT), with `itg_labels`, -100 on padding, bos and the prompt but its last token, as in the
    published collator. A caption over `max_length` loses its end, never its eos. Raises ValueError
    for an empty caption, naming the sample, and for a processor that gives several tiles a picture.
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
            given = f"the processor gives up to {processor.max_tiles}"
            raise ValueError(f"pairs need one square a picture, {given}; use its whole()")
        self.tokenizer, self.processor = tokenizer, processor
        self.max_length, self.tasks = max_length, tuple(tasks)
        self.itc_prompt = itc_prompt
        self._checked: set[str] = set()  # languages whose prompt leaves room
        self.caption_prompts = dict(caption_prompts or {"en": "English caption:", "zh": "Chinese caption:", OTHER: "Caption:"})

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.stack([self.prepare(sample) for sample in samples])

    def prepare(self, sample: Sample) -> Prepared:
        """The square of a picture and the token rows of its caption; errors name the sample."""
        key = sample["key"]
        check_caption(sample)
        found: Prepared = {
            "key": key,
            "image_id": stable_id(sample.get("image_id", key)),
            "pair_id": stable_id(f"{sample.get('image_id', key)}\n{sample['caption']}"),
            "tiles": base.tiles_of(self.processor, sample["image"], key, sample.get("draw")),
        }
        for task in self.tasks:
            prompt = self._prompt(sample, task)
            found[task] = self._row(prompt, sample)
            if task == "itg":
                hidden = max(1, len(prompt) - 1)
                found["itg_labels"] = [IGNORE_INDEX] * hidden + found[task][hidden:]
        return found

    def check(self, sample: Sample) -> None:
        """Raise ValueError if `prepare` does: by the picture, and by the prompt of the language,
        which alone can leave a caption no room."""
        check_caption(sample)
        base.tiles_of(self.processor, sample["image"], sample["key"], sample.get("draw"))
        language = sample.get("language", "en")
        if language not in self._checked or not sample["caption"].strip():
            self.prepare(sample)
            self._checked.add(language)

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared pairs."""
        batch: dict[str, Any] = {
            "keys": [one["key"] for one in prepared],
            "pixel_values": base.pixels_of(self.processor, [one["tiles"] for one in prepared]),
            **base.picture_keys(prepared, self.picture_keys),
            "image_ids": torch.tensor([one["image_id"] for one in prepared]),
            "pair_ids": torch.tensor([one["pair_id"] for one in prepared]),
        }
        for task in self.tasks:
            ids, mask = pad_rows([one[task] for one in prepared], pad_id(self.tokenizer))
            batch |= {f"{task}_ids": ids, f"{task}_mask": mask}
            if task == "itg":
                batch["itg_labels"], _ = pad_rows([one["itg_labels"] for one in prepared], IGNORE_INDEX)
        return batch

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The largest batch that a step can meet, without data, to measure its memory."""
        side = self.processor.image_size
        batch = {
            "pixel_values": torch.zeros(batch_size, 3, side, side, device=device),
            "image_ids": torch.arange(batch_size, device=device),
            "pair_ids": torch.arange(batch_size, device=device),
        }
        rows: dict[str, Any] = {"dtype": torch.int64, "device": device}
        for task in self.tasks:
            batch[f"{task}_ids"] = torch.zeros(batch_size, self.max_length, **rows)
            batch[f"{task}_mask"] = torch.ones(batch_size, self.max_length, **rows)
            if task == "itg":
                batch["itg_labels"] = torch.zeros(batch_size, self.max_length, **rows)
        return batch

    def rows(self, task: str, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token rows of bare captions for itc or itm, and their padding id, as for `pad_rows`."""
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
        prompt = self.caption_prompts.get(language, self.caption_prompts.get(OTHER))
        if prompt is None:
            known = ", ".join(self.caption_prompts)
            fault = f"no caption prompt for language {language!r}, but for {known}"
            advice = f"+{SETTING}.{language}='A PROMPT' gives one, +{SETTING}.{OTHER}='Caption:' one for all others"
            raise ValueError(f"sample {sample['key']}: {fault}; {advice}")
        return self.prompt_ids(prompt)

    def _row(self, prompt: list[int], sample: Sample) -> list[int]:
        caption = sample["caption"].strip()
        if not caption:
            raise ValueError(f"sample {sample['key']}: its caption is empty")
        follows_text = prompt and prompt[-1] not in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        ids = continuation_ids(self.tokenizer, f" {caption}" if follows_text else caption)
        room = self.max_length - len(prompt) - 1
        if room < 1:
            fault = f"no room for a caption after {len(prompt)} tokens"
            raise ValueError(f"max_length={self.max_length} leaves {fault}")
        return [*prompt, *ids[:room], self.tokenizer.eos_token_id]


def check_caption(sample: Sample) -> None:
    """Raise BadSample for a query with documents in place of a captioned picture."""
    if "caption" not in sample:
        fault = "it has a query and documents, which the stage embed compares"
        raise BadSample(f"sample {sample['key']}: {fault}", "no caption")
