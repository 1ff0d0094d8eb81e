"""The collators that a stage's parts can use."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_internvl.choices import Config
from lightning_internvl.config.fit import unread
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.embedding import EmbeddingCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.collate.instructions import Instructions
from lightning_internvl.data.collate.labels import LabelCollator
from lightning_internvl.data.collate.packed import PackedChats
from lightning_internvl.data.collate.packing import PACKED
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.collate.questions import QuestionChats
from lightning_internvl.data.processors.basic import Processor
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import token_id
from lightning_internvl.model.compatibility import check_captions, check_packable, check_processor
from lightning_internvl.model.compose import Build
from lightning_internvl.model.vlm import VLM, shifts_labels

TRAINING = ("preferences", "answers", "answer_tokens")  # of a collator: what is measured has one answer, the true one
OWN_PROCESSOR = "processor.json"  # in an exported folder: one from outside this project


class View(NamedTuple):
    """How a stage sees data: `pairs`, `chats` and `labels`, each None in a model that reads none,
    prepare what is measured, `training` the batches of a step."""

    pairs: PairCollator | Any
    chats: ChatCollator | Any
    training: Any
    model: VLM
    labels: LabelCollator | Any = None


def make_view(settings: StageSettings, model: VLM, tokenizers: Mapping[str, Any], build: Build) -> View:
    """The collators of the stage's parts: pairs if the middleware reads text, or chats.

    Pictures go through `data.processor` in training and, where it is given, `data.eval_processor`
    in evaluation; a stage with a `collate.processor` uses that for both. `eval_processor` and a
    stage's processor may be changes only, without a `_target_`. `data.jpeg_quality` is for training
    alone.
    """
    processor = build(_changed(settings.data.processor, settings.collate.get("processor")))
    processor.jpeg_quality = settings.data.jpeg_quality
    measured = build(measuring_processor(settings))
    training = make_collators(settings, model, tokenizers, processor, packed=settings.packing == PACKED)
    if settings.reads not in training:
        raise ValueError(unread(settings.reads))
    collate = {name: value for name, value in settings.collate.items() if name not in TRAINING}
    plain = replace(settings, collate=collate)
    found = make_collators(plain, model, tokenizers, measured, more_tiles=measured.max_tiles - processor.max_tiles)
    return View(found.get("pairs"), found.get("chats"), training[settings.reads], model, found.get("labels"))


def measuring_processor(settings: StageSettings) -> Config:
    """The configuration of what prepares pictures that are measured, and those of a model in
    use."""
    own = settings.collate.get("processor")
    return _changed(settings.data.processor, own or settings.data.eval_processor)


def make_collators(
    settings: StageSettings,
    model: VLM,
    tokenizers: Mapping[str, Any],
    processor: Processor,
    more_tiles: int = 0,
    packed: bool = False,
) -> dict[str, Any]:
    """Collators by kind of data, with one processor.

    Args:
        more_tiles: by how many tiles a picture may exceed those that `max_length` was made for.
        packed: whether conversations share rows.

    Raises:
        ValueError: for rows that the decoder cannot read, or that could not hold a conversation.
    """
    data, reads = settings.data, settings.reads
    found: dict[str, Any] = {}
    collate = {name: value for name, value in settings.collate.items() if name != "processor"}
    whole = processor.whole()
    whole.jpeg_quality = processor.jpeg_quality
    if "middleware" in tokenizers and not settings.embeds:
        options = data.pairs_collate | (collate if reads == "pairs" else {})
        found["pairs"] = pairs = PairCollator(tokenizers["middleware"], whole, **options)
        check_captions(model.middleware, pairs.max_length)
    if hasattr(model.middleware, "classes"):
        found["labels"] = LabelCollator(whole)
    if "decoder" in tokenizers:
        check_processor(model, processor)
        rows = DecoderRows(settings, model, tokenizers, processor, more_tiles)
        chats = collate if reads == "chats" else {}
        asks = "answers" in data.chats_collate | chats
        if asks and packed:
            own = f"set data.packing=null, or stages.{settings.name}.datasets.packing=null"
            raise ValueError(f"rows cannot be packed before the model has answered; {own}")
        found["chats"] = rows.collator(PackedChats if packed else QuestionChats if asks else ChatCollator, chats)
        if settings.embeds:
            cached = {"cached_chunk": settings.module.get("cached_chunk")}
            found["pairs"] = rows.collator(EmbeddingCollator, collate | cached)
    return found


class DecoderRows(NamedTuple):
    """What collators for a decoder have in common; `more_tiles` as of `make_collators`."""

    settings: StageSettings
    model: VLM
    tokenizers: Mapping[str, Any]
    processor: Processor
    more_tiles: int

    def collator(self, kind: type[ChatCollator], collate: Mapping[str, Any]) -> ChatCollator:
        """A collator of this kind, with the settings of a stage over those of the data."""
        data, model, processor = self.settings.data, self.model, self.processor
        tokens, options = model.placeholders(processor.image_size), data.chats_collate | dict(collate)
        template = load_template(options.pop("template"), options.pop("system", None))
        frame = options.pop("image_frame", None)
        start, end = (template.image_frame if frame is None else frame) or (None, None)
        names = ImageTokens(data.image_token, start, end, data.video_token)
        for name in filter(None, (names.start, names.end)):
            token_id(self.tokenizers["decoder"], name)
        options["image_tokens"] = names
        text, total, pictures = options.pop("max_text_tokens"), options.pop("max_length", None), options.pop("pictures", 1)
        packed = kind is PackedChats
        row = data.packing_tokens if packed else None
        frames = (options.get("video_frames") or (0,))[-1]
        squares = max(processor.most_squares(pictures), frames)
        one = text + processor.most_tokens(tokens)
        most = text + max(processor.most_tokens(tokens, pictures), frames * tokens)
        max_length = total + max(0, self.more_tiles) * tokens if total else _row_length(model, one, most, row)
        if kind is EmbeddingCollator:
            options.pop("too_long", None)
            options["text_length"] = min(text, max_length)
        else:
            options["split_answers"] = not shifts_labels(model.decoder)
        if getattr(model.middleware, "instructed", False):
            options["instructions"] = Instructions(self.tokenizers["middleware"])
        if packed:
            check_packable(model.decoder)
            options |= {"row_tokens": data.packing_tokens, "row_tiles": data.packing_tiles}
        found = kind(self.tokenizers["decoder"], template, processor, tokens, max_length, **options)
        if not packed and not total:
            found.blank_tiles = squares
        return found


def _row_length(model: VLM, one: int, most: int, row: int | None) -> int:
    """Tokens of a row: `most`, those of as many pictures as a record has room for, within what the
    decoder reads and the tokens of a packed `row`; for `one` picture there is room always."""
    limit = getattr(getattr(getattr(model.decoder, "lm", None), "config", None), "max_position_embeddings", None)
    return max(one, min(most, limit or sys.maxsize, row or sys.maxsize))


def _changed(processor: Config, change: Config | None) -> Config:
    """A processor's configuration with some settings changed, or another one."""
    return dict(change) if change and "_target_" in change else {**processor, **(change or {})}
