"""Batches of queries and documents, which a decoder reads to embed them.

Letters: B samples, K wrong documents of each, L longest row of a part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lightning_internvl.choices import NOTHING
from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.collate.base import Prepared, Sample, pad_id, pad_rows, picture_keys, stable_id
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import encode_passage
from lightning_internvl.data.processors.basic import Processor
from lightning_internvl.data.templates import IMAGE, ChatTemplate, Message

QUERIES, DOCUMENTS = "queries", "documents"  # parts of a batch, each a list of batches of rows


class EmbeddingCollator(ChatCollator):
    """Pairs to a batch for a contrast of embeddings.

    Takes samples {"image", "caption", "key"}, of which the caption is the query and the picture its
    document, or {"query", "positive", "negatives", "key"}, {"text", "images"} each, with a mark in the
    text for each picture. Gives `queries`, batches of rows as `ChatCollator` makes them, without
    labels, B rows in all; `documents` likewise, the B right ones and behind them K of each query; and
    `query_ids` (B,) and `document_ids` (B * (1 + K),) int64, equal for equal rows and pictures. In the
    place of a wrong document that a sample lacks its right one stands, with the number -1.
    Raises BadSample naming a sample one of whose wrong documents reads as the right one.

    Args:
        instruction: stands before the text of each query.
        negatives: K; of a sample that has more the first ones are read.
        text_length: tokens of a row without pictures, for `blank`.
        cached_chunk: rows of one batch of `queries` and `documents`; None: all.
        settings: of `ChatCollator`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        processor: Processor,
        tokens_per_tile: int,
        max_length: int,
        *,
        instruction: str = "",
        negatives: int = 0,
        text_length: int,
        cached_chunk: int | None = None,
        **settings: Any,
    ) -> None:
        given = tokenizer, template, processor, tokens_per_tile, max_length
        super().__init__(*given, split_answers=False, too_long="cut", preferences=False, **settings)
        if negatives < 0:
            raise ValueError(f"{negatives=} must be 0 or more")
        self.instruction, self.negatives = instruction, negatives
        self.text_length, self.cached_chunk = text_length, cached_chunk

    def prepare(self, sample: Sample) -> Prepared:
        """The rows and pictures of a sample's query and documents. Raises ValueError naming it."""
        found = self._passages(sample)
        names = [name_of(one) for one in found]
        if names[1] in names[2:]:
            fault = f"negative {names[2:].index(names[1])} reads as the positive"
            raise BadSample(f"sample {sample['key']}: {fault}, so that nothing tells them apart", "equal documents")
        return {"key": sample["key"], "passages": found, "names": names}

    def check(self, sample: Sample) -> None:
        """Raise ValueError if `prepare` does, but for contents that are equal."""
        self._passages(sample)

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared samples."""
        rows = [self._filled(one["passages"], one["passages"][1]) for one in prepared]
        names = [self._filled(one["names"], NOTHING) for one in prepared]
        places = [(sample, 1) for sample in range(len(rows))]
        places += [(sample, 2 + place) for sample in range(len(rows)) for place in range(self.negatives)]
        return {
            "keys": [one["key"] for one in prepared],
            QUERIES: self._parts([one[0] for one in rows]),
            DOCUMENTS: self._parts([rows[sample][place] for sample, place in places]),
            "query_ids": torch.tensor([one[0] for one in names]),
            "document_ids": torch.tensor([names[sample][place] for sample, place in places]),
        }

    def pictures(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Pictures (H, W, 3) uint8 as documents."""
        rows = [{"text": IMAGE, "images": [image]} for image in images]
        return self._batch([self._passage(one, {"key": f"picture {place}"}, 0) for place, one in enumerate(rows)])

    def texts(self, texts: Sequence[str]) -> dict[str, Any]:
        """Texts as queries."""
        rows = [{"text": text, "images": []} for text in texts]
        found = [self._passage(one, {"key": repr(one["text"][:40])}, 0, self.instruction) for one in rows]
        return self._batch(found)

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """A batch as large as one of texts and pictures may be, without data: texts without pictures find
        rows of `max_length` with them."""
        documents = batch_size * (1 + self.negatives)
        whole = {name: x for name, x in super().blank(documents, device).items() if name != "labels"}
        ids = torch.full((batch_size, self.text_length), pad_id(self.tokenizer), device=device)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_counts": ids[:, 0] * 0}
        texts |= self.processor.blank(0, device) | (self.instructions.blank(0, device) if self.instructions else {})
        names = torch.arange(documents, device=device)
        return {QUERIES: [texts], DOCUMENTS: [whole], "query_ids": names[:batch_size], "document_ids": names}

    def _passages(self, sample: Sample) -> list[Prepared]:
        query, *documents = passages_of(sample)
        found = [self._passage(query, sample, 0, self.instruction)]
        return found + [self._passage(one, sample, place + 1) for place, one in enumerate(documents[: 1 + self.negatives])]

    def _passage(self, passage: Mapping[str, Any], sample: Sample, place: int, before: str = "") -> Prepared:
        """The row and the pictures of one text."""
        message: Message = {"role": "user", "content": f"{before}{passage['text']}"}
        draw = {"draw": [*sample["draw"], place]} if "draw" in sample else {}
        one = {"images": passage["images"], "conversation": [message], "key": sample["key"], **draw}
        return self._prepared(one, encode_passage)

    def _filled(self, found: Sequence[Any], filler: Any) -> list[Any]:
        """What a sample has of its query and documents, with a filler for each wrong one that it lacks."""
        return [*found, *[filler] * (2 + self.negatives - len(found))]

    def _parts(self, rows: Sequence[Prepared]) -> list[dict[str, Any]]:
        size = self.cached_chunk or len(rows)
        return [self._batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _batch(self, rows: Sequence[Prepared]) -> dict[str, Any]:
        ids, mask = pad_rows([one["row"] for one in rows], pad_id(self.tokenizer))
        counts = torch.tensor([len(one["pictures"]) for one in rows])
        names = picture_keys(rows, self.picture_keys)
        shown = {"image_counts": counts, **self._inputs(rows), **names}
        return {"input_ids": ids, "attention_mask": mask, "right_padded": True, **shown}


def passages_of(sample: Sample) -> list[dict[str, Any]]:
    """The query, the right document and wrong ones of a sample of pairs."""
    if "query" in sample:
        return [sample["query"], sample["positive"], *sample["negatives"]]
    return [{"text": sample["caption"], "images": []}, {"text": IMAGE, "images": [sample["image"]]}]


def name_of(prepared: Prepared) -> int:
    """A whole number for the row and the pictures of a text, the same in every process."""
    digest = hashlib.blake2b(digest_size=16)
    for shown in (*prepared["pictures"], *prepared["videos"]):
        digest.update(f"{shown.shape}".encode())
        digest.update(shown.tobytes())
    return stable_id(f"{prepared['row']} {digest.hexdigest()}")


def batches_of(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The batches of rows that a batch consists of: those of queries and documents, or itself."""
    return [*batch[QUERIES], *batch[DOCUMENTS]] if QUERIES in batch else [batch]


def with_batches(batch: Mapping[str, Any], changed: Any) -> dict[str, Any]:
    """A batch with another one in the place of each batch of rows."""
    if QUERIES not in batch:
        return dict(changed(batch))
    rest = {name: value for name, value in batch.items() if name not in (QUERIES, DOCUMENTS)}
    return {**changed(rest), **{name: [changed(part) for part in batch[name]] for name in (QUERIES, DOCUMENTS)}}
