"""Scores of pairs: those of `measures`, and how well a model thinks that picture and caption agree.

Letters: B pairs, E contrastive width, Q queries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_internvl.data.bad_samples import kind_of, reason_of, writable
from lightning_internvl.data.collate.base import unchanged
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.files.images import image_size, read_image
from lightning_internvl.data.shards.tar import Record, ShardError
from lightning_internvl.distributed.signals import shield_worker
from lightning_internvl.files import json_text, write_text
from lightning_internvl.filtering.measures import READ, TOLD_LANGUAGE, Row, measure_pair
from lightning_internvl.filtering.sources import JoinedShards
from lightning_internvl.messages import without_secrets
from lightning_internvl.model.vlm import VLM

DIGITS = 6  # behind the point of a similarity: `decide` counts each value that this leaves
UNUSABLE = "unusable"  # the entry of a row without scores: the kind of its fault


class ScoringBatch(NamedTuple):
    """Neighbouring records of one shard; the last ones say so, and why it ended early."""

    shard: int
    records: list[Record]
    ends: bool = False
    fault: str | None = None


class ScoredBatch(NamedTuple):
    """The rows of a `ScoringBatch`, without similarities."""

    shard: int
    rows: list[Row]
    ends: bool
    fault: str | None


class SimilarityModel(NamedTuple):
    """What compares pictures with captions.

    Attributes:
        pairs: prepares both.
        mode: of the embeddings, where the system has several: "c" or "g".
    """

    model: VLM
    pairs: PairCollator
    mode: str
    device: torch.device
    autocast: torch.dtype | None = None

    @torch.inference_mode()
    def similarities(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> list[float]:
        """Cosines of B pictures and their captions; of several embeddings a picture the nearest
        counts, as in Q-Former."""
        pixels, ids, mask = (x.to(self.device) for x in (pixels, ids, mask))
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            image = F.normalize(self.model.encode_image(pixels, self.mode).float(), dim=-1)
            text_BE = F.normalize(self.model.encode_text(ids, mask).float(), dim=-1)
        image_BQE = image if image.ndim == 3 else image[:, None]
        found = (image_BQE @ text_BE[..., None])[..., 0].amax(dim=1)
        if not found.isfinite().all():
            why = "its weights are broken, or it needs another precision"
            raise ValueError(f"the model finds similarities that are not finite: {why}")
        return found.tolist()


class Scorer:
    """Scores whole shards, one after the other.

    Args:
        model: None leaves the similarity out.
        language: whether the language of captions is guessed, and with `untold` whether it is of
            those whose record and source say none.
        batch_size: pairs that are prepared and compared at a time. Shards share no batch, so that a
            shard's scores do not depend on what came before it.
        num_workers: processes that decode; 0 decodes in this one.
    """

    def __init__(
        self,
        shards: JoinedShards,
        model: SimilarityModel | None = None,
        *,
        language: bool = False,
        untold: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.shards, self.model = shards, model
        self.batch_size, self.num_workers = batch_size, num_workers
        self.preparing = _PreparedRecords(shards, model and model.pairs, language, untold)

    def score(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[Row]]]:
        """The rows of each shard, a row for each record and one for what ended a shard early."""
        loader = DataLoader(
            self.preparing,
            sampler=self._work(numbers),  # what a "place" in the data set is, is up to us
            batch_size=None,
            collate_fn=unchanged,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            prefetch_factor=4 if self.num_workers else None,
        )
        rows: list[Row] = []
        for work, batch in loader:
            shard, found, ends, fault = work
            if batch is not None and self.model is not None:
                usable = [row for row in found if UNUSABLE not in row]
                for row, similarity in zip(usable, self.model.similarities(*batch), strict=True):
                    row["similarity"] = round(similarity, DIGITS)
            rows += found
            if ends:
                rows += [{"key": told_key(self.shards.name(shard)), UNUSABLE: ShardError.kind, "reason": fault}] if fault else []
                yield shard, rows
                rows = []

    def _work(self, numbers: Iterable[int]) -> Iterator[ScoringBatch]:
        for shard in numbers:
            records, fault = list[Record](), None
            try:
                for record in self.shards.read(shard):
                    records.append(record)
                    if len(records) == self.batch_size:
                        yield ScoringBatch(shard, records)
                        records = []
            except ShardError as error:
                fault = reason_of(error)
            yield ScoringBatch(shard, records, True, fault)


class _PreparedRecords(Dataset[Any]):
    """All that needs no model, for a process of its own. A "place" is the records themselves."""

    def __init__(self, shards: JoinedShards, pairs: PairCollator | None, language: bool, untold: bool) -> None:
        self.shards, self.pairs, self.language, self.untold = shards, pairs, language, untold

    def __getitem__(self, work: ScoringBatch) -> tuple[ScoredBatch, tuple[Tensor, Tensor, Tensor] | None]:
        rows, prepared = list[Row](), list[dict[str, Any]]()
        for record in work.records:
            try:
                pair = self.shards.pair(record)
                size, caption = image_size(pair["image"]), pair["caption"]
                image = read_image(pair["image"], self.shards.decode_at)
                told = pair.get("language") or self.shards.language(work.shard)
                guessed = self.language or (self.untold and not told)
                row = {"key": told_key(record["key"]), **measure_pair(image, caption, size, guessed)}
                if told:
                    row[TOLD_LANGUAGE] = told
                # Of a caption of a million letters the first thousands fill any row
                if self.pairs is not None:
                    prepared.append(self.pairs.prepare({"key": record["key"], "image": image, "caption": caption[:READ]}))
                rows.append(row)
            except Exception as error:
                rows.append({"key": told_key(record["key"]), UNUSABLE: kind_of(error), "reason": reason_of(error)})
        batch = None
        if prepared:
            assert self.pairs is not None  # which has prepared them
            found = self.pairs.stack(prepared)
            batch = found["pixel_values"], found["itc_ids"], found["itc_mask"]
        return ScoredBatch(work.shard, rows, work.ends, work.fault), batch


def told_key(key: str) -> str:
    """The name of a record or a shard as rows have it: without secrets, as addresses may have, and in characters that any file
    takes."""
    return without_secrets(writable(key))


def scores_file(folder: Path, shard: int) -> Path:
    """Where the scores of a shard lie; a file there is whole: the shard is scored."""
    return folder / "scores" / f"{shard:06d}.jsonl"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, one a line, all or nothing."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
