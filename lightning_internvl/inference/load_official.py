"""A folder in an official layout, opened for use: the model, and how it reads.

What the files say is taken from there: the tokenizer, sizes and channel statistics of pictures, the
chat format of a folder that `export.py` wrote. The rest is what each system was published with
(`lightning_internvl.inference.published_systems`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.official import language_model_place, recognised
from lightning_internvl.checkpoints.pretrained import load_pretrained
from lightning_internvl.config.consent import giving_parts
from lightning_internvl.config.trust import check_parts
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.collate.instructions import Instructions
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.jinja_templates import jinja_of, texts_of
from lightning_internvl.data.processors.basic import Processor
from lightning_internvl.data.templates import IMAGE, ChatTemplate, load_template, template_names
from lightning_internvl.data.tokenizer import SAVED_FILES, saved_tokenizer
from lightning_internvl.files import read_json
from lightning_internvl.hub import local_folder
from lightning_internvl.inference.collators import OWN_PROCESSOR, View
from lightning_internvl.inference.load_run import check_kind
from lightning_internvl.inference.published_systems import (
    HANDOFF,
    PROCESSORS,
    SYSTEMS,
    Lacking,
    System,
    make_processor,
    named,
    picture_fields,
    processor_name,
    system_of,
)
from lightning_internvl.messages import did_you_mean
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.compatibility import check_processor
from lightning_internvl.model.compose import trusted_build
from lightning_internvl.model.vlm import VLM, shifts_labels

PLACEHOLDER = "<IMG_CONTEXT>"  # in text, where a layout has no word for a visual token
SAVED = "lightning_internvl.data.tokenizer.saved_tokenizer"
LONGEST = 4096  # tokens of a conversation, where the model does not say
Frame = tuple[str, str] | None


class OfficialModel(NamedTuple):
    """A model with its collators, and its layout."""

    view: View
    layout: str


def open_model(
    place: str | Path,
    *,
    template: str | None = None,
    system: str | None = None,
    tokenizer: str | Path | None = None,
    pictures: str | None = None,
    encoder: str | Path | None = None,
    decoder: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> OfficialModel:
    """A folder in an official layout, an exported hand-off, or a hub id; its code is not run.

    Args:
        template: a chat format in place of the folder's own or the published one.
        system: a system message in place of that of the chat format; "" leaves it out.
        tokenizer: a folder or hub id with a tokenizer, where the model's own folder holds none.
        pictures: how they are prepared, one of `PROCESSORS`, in place of the published way.
        encoder, decoder: folders or hub ids of parts that the files only name.
        dtype: as in `load_pretrained`.

    Raises:
        ValueError: as `load_pretrained`; for a model that neither answers nor compares; for what is
            missing, with how to give it.
    """
    if pictures is not None and pictures not in PROCESSORS:
        raise ValueError(f"{pictures=} is not known; {did_you_mean(pictures, PROCESSORS)}")
    if template is not None and template not in template_names():
        raise ValueError(f"{template=} is not known; {did_you_mean(template, template_names())}")
    with giving_parts({"encoder": encoder, "decoder": decoder}):
        return _opened(place, template, system, tokenizer, pictures, dtype)


def _opened(
    place: str | Path,
    template: str | None,
    system: str | None,
    tokenizer: str | Path | None,
    pictures: str | None,
    dtype: torch.dtype | None,
) -> OfficialModel:
    folder = local_folder(place)
    layout, config, native = layout_of(folder)
    known = system_of(layout, config)
    if known is None:
        raise ValueError(f"{place} ({layout}) neither answers nor compares; layouts that do: {', '.join(SYSTEMS)}")
    words = load_tokenizer(tokenizer or tokenizer_place(place, folder))
    words.add_tokens([*known.added], special_tokens=True)
    model, found = load_pretrained(place, dtype=dtype), picture_fields(folder)
    name = pictures or processor_name(known, found, config, model, by_class=native)
    own = None if pictures else own_processor(folder)
    prepared = trusted_build(own) if own else make_processor(name, model, found, config, known.statistics)
    if model.decoder is None:
        pairs = FolderPairs(words, prepared.whole(), **_reading(layout, model))
        return OfficialModel(View(pairs, None, pairs, model), layout)
    context = placeholder(model, words, known)
    chosen, frame = chat_format(words, known, context, template or named(known.template, config, model), bool(template))
    chosen = chosen if system is None else chosen.with_system(system)
    names = ImageTokens(context, *(frame or (None, None)))
    chats = _chats(folder, model, words, prepared, chosen, names, known.video_frames)
    return OfficialModel(View(None, chats, chats, model), layout)


def layout_of(folder: Path) -> tuple[str, Config, bool]:
    """Name, `config.json`, and whether transformers prepares pictures for it as
    `preprocessor_config.json` says."""
    if (folder / handoff.MANIFEST).is_file():
        return HANDOFF, {}, True
    layout, config = recognised(folder)
    return layout.key, config, layout.NATIVE


def own_processor(folder: Path) -> Config | None:
    """The configuration of a processor from outside this project that prepared pictures for an
    exported model; None without one.

    Raises:
        Untrusted: for one that the user does not trust.
    """
    node = read_json(folder / OWN_PROCESSOR) if folder.is_dir() else None
    if node is not None:
        check_parts(node, folder)
        check_kind(OWN_PROCESSOR, node, (Processor,), folder)
    return node


def tokenizer_place(place: str | Path, folder: Path) -> str | Path:
    """Where a model's tokenizer lies: in its own folder, else in that of the language model, or of
    the base, that its files only name.

    Raises:
        ValueError: if that is not found.
    """
    own = folder if Path(place).exists() else place
    holds = folder.is_dir() and any(file for kind in SAVED_FILES for file in folder.glob(kind))
    return own if holds or (folder / handoff.MANIFEST).is_file() else language_model_place(folder) or own


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: if there is none that can be read without running code that comes with it.
    """
    place = Path(source).parent if Path(source).is_file() else source
    try:
        return saved_tokenizer(str(place))
    except Exception as error:  # of any kind: the library does not check what it reads
        reason = " ".join(str(error).split())[:200]
        kind = type(error).__name__
        what = f"{place} holds no tokenizer that can be read without running code from there ({kind}: {reason})"
        raise Lacking(what, "tokenizer", "FOLDER_OR_ID") from error


def placeholder(model: VLM, words: PreTrainedTokenizerBase, known: System) -> str:
    """The word that stands for a visual token; one is added for an id that is no word."""
    model.image_placeholders = None  # in rows made here every visual token has a placeholder
    if model.image_token_id is not None and 0 <= model.image_token_id < len(words):
        return words.convert_ids_to_tokens([model.image_token_id])[0]
    own = known.added[-1] if known.added else PLACEHOLDER
    words.add_tokens(own, special_tokens=True)
    model.image_token_id = words.get_vocab()[own]
    return own


def chat_format(
    words: PreTrainedTokenizerBase, known: System, context: str, name: str, chosen: bool
) -> tuple[ChatTemplate, Frame]:
    """The chat format, and the tokens around a picture.

    Args:
        name: the format that was asked for (`chosen`) or published, "" if there is none.
    """
    vocabulary = words.get_vocab()
    if not chosen and (found := written_format(words.chat_template or "", known, context, name)):
        return found
    if not name:
        choices = f"NAME, one of {', '.join(template_names())}"
        raise Lacking("the folder does not say its chat format", "template", choices)
    template = load_template(name, None if chosen else known.system)
    frame = (template.image_frame if chosen else None) if known.frame is None else known.frame
    return template, frame if frame and all(token in vocabulary for token in frame) else None


def written_format(text: str, known: System, context: str, usual: str = "") -> tuple[ChatTemplate, Frame] | None:
    """The chat format that `export.py` wrote as this `chat_template.jinja`, or None; where several
    write the same text that of the name `usual`."""
    system = re.search(r'namespace\(system=("(?:[^"\\]|\\.)*")', text)
    if not system:
        return None
    written = texts_of(text)
    for name in sorted(template_names(), key=lambda name: name != usual):
        template = load_template(name, json.loads(system[1]))
        if template.image_frame and written == texts_of(jinja_of(template, context.join(template.image_frame))):
            return template, template.image_frame
        # A processor adds the rest, if there is any.
        if written in [texts_of(jinja_of(template, picture)) for picture in (context, "", IMAGE)]:
            return template, known.frame or None
    return None


def _chats(
    folder: Path,
    model: VLM,
    words: PreTrainedTokenizerBase,
    processor: Processor,
    template: ChatTemplate,
    names: ImageTokens,
    frames: tuple[int, int] | None,
) -> ChatCollator:
    check_processor(model, processor)
    instructions = None
    if getattr(model.middleware, "instructed", False):
        instructions = Instructions(load_tokenizer(folder / "qformer_tokenizer"))
    return ChatCollator(
        words,
        template,
        processor,
        model.placeholders(processor.image_size),
        LONGEST,
        names,
        split_answers=not shifts_labels(model.decoder),
        instructions=instructions,
        video_frames=frames,
    )


def _reading(layout: str, model: VLM) -> Config:
    """How a model without a decoder reads captions."""
    tower = getattr(model.middleware, "text_model", None)
    if tower is not None:
        return {"itc_prompt": "", "max_length": len(tower.embeddings.position_embedding.weight), "fill": layout == "siglip"}
    return {"itc_prompt": "summarize:" if isinstance(model.middleware, QLLaMA) else "", "max_length": 80}


class FolderPairs(PairCollator):
    """A `PairCollator` whose tokenizer, where it puts the end token by itself, makes rows of bare
    captions as it does for the original model.

    Args:
        fill: whether rows are filled up to `max_length` and count as full (SigLIP).
    """

    def __init__(self, *args: Any, fill: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fill = fill

    def rows(self, task: str, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token rows and the id to pad them with."""
        words = self.tokenizer
        if self.itc_prompt or words("a")["input_ids"][-1] != words.eos_token_id:
            rows, pad = super().rows(task, captions)
            return [row + [pad] * (self.max_length - len(row)) for row in rows] if self.fill else rows, pad
        padding = "max_length" if self.fill else False
        rows = words(list(captions), truncation=True, max_length=self.max_length, padding=padding)["input_ids"]
        return rows, words.eos_token_id if words.pad_token_id is None else words.pad_token_id
