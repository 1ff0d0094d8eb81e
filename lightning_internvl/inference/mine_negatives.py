"""Wrong documents for a file of queries and documents: those that a finished stage `embed` finds nearest
to each query and the file does not call right (hard negatives; Xiong et al. 2021, ANCE).

python -m lightning_internvl.inference.mine_negatives --run RUN --pairs PAIRS.jsonl --out MINED.jsonl

Letters: N samples, D different documents, E width.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_internvl.config.model_source import ModelSource
from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.data.collate.embedding import DOCUMENTS, QUERIES, EmbeddingCollator
from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.files.datasets import PairsFile
from lightning_internvl.data.files.passages import Passage, Passages
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.files import write_text
from lightning_internvl.inference.device import place_for
from lightning_internvl.inference.embeddings import normalised, placed
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.inference.predictor import Precision
from lightning_internvl.messages import check_number, told_by
from lightning_internvl.model.row_embeddings import embed_rows
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import similarities

ROWS = 64  # queries that are embedded, and compared, at a time


class EmbeddedPairs(NamedTuple):
    """Normalised embeddings of the queries and right documents of samples, (N, E) each, or (N, L, E) with
    a vector a token, and names of their contents, (N,) each, equal for equal ones."""

    queries: Tensor
    documents: Tensor
    query_ids: Tensor
    document_ids: Tensor


@torch.no_grad()
def embed_samples(model: VLM, pairs: EmbeddingCollator, samples: Any, precision: Precision) -> EmbeddedPairs:
    """Embeds samples as `EmbeddingCollator` takes them; they are read one by one, by their places."""
    collate, parts = copy.copy(pairs), []
    collate.negatives, collate.cached_chunk = 0, None
    for start in range(0, len(samples), ROWS):
        batch = collate.stack([collate.prepare(samples[i]) for i in range(start, min(start + ROWS, len(samples)))])
        with precision():
            sides = [embed_rows(model, placed(model, batch[side][0])).float() for side in (QUERIES, DOCUMENTS)]
        parts.append((*sides, batch["query_ids"], batch["document_ids"]))
    queries, documents, *names = zip(*parts, strict=True)
    return EmbeddedPairs(normalised(queries), normalised(documents), *map(torch.cat, names))


def nearest_wrong(pairs: EmbeddedPairs, count: int, margin: float = 0.0) -> list[list[int]]:
    """For each sample those whose documents are nearest to its query, the nearest first, `count` at most,
    each content once; a document of an equal query is right, too.

    Args:
        margin: a document is left out unless it is less similar than the right one by this much; what is
            nearer may be right itself (Moreira et al. 2024, NV-Retriever, TopK-MarginPos).
    """
    names = pairs.document_ids.tolist()
    first = {name: place for place, name in reversed([*enumerate(names)])}  # the first sample with each document
    firsts_D = torch.tensor([*first.values()])
    column_of = {name: column for column, name in enumerate(first)}
    column_N = torch.tensor([column_of[name] for name in names])
    documents, found = pairs.documents[firsts_D], []
    for start in range(0, len(column_N), ROWS):
        rows = slice(start, start + ROWS)
        scores_RD = similarities(documents, pairs.queries[rows]).T.cpu()
        right_RN = pairs.query_ids[rows, None] == pairs.query_ids
        right_RD = torch.zeros(scores_RD.shape).index_add_(1, column_N, right_RN.float()).bool()
        limit_R1 = scores_RD.gather(1, column_N[rows, None]) - margin
        wrong_RD = scores_RD.masked_fill(right_RD | (scores_RD > limit_R1), -torch.inf)
        values, places = wrong_RD.topk(min(count, len(documents)), dim=1)
        found += [firsts_D[row[kept]].tolist() for row, kept in zip(places, values.isfinite(), strict=True)]
    return found


def mined_records(data: PairsFile, wrong: Sequence[Sequence[int]], folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a file with wrong documents before those that they had; paths start at `folder`."""
    known = [_passages(data, place, folder) for place in range(len(data))]
    for own, places in zip(known, wrong, strict=True):
        query, positive, *negatives = own
        yield {"query": query, "positive": positive, "negatives": [*(known[place][1] for place in places), *negatives]}


def _passages(data: PairsFile, place: int, folder: Path) -> list[dict[str, Any]]:
    """The query and documents of a record as files have them."""
    source, record, line = data.records.read(place)
    entry = read_entry(record, data.caption_request)
    found = entry.passages or Passages(Passage(entry.caption or "", []), Passage(IMAGE, entry.images), [])
    root = source.root if data.image_root is None else data.image_root

    def path(picture: str | bytes) -> str:
        if isinstance(picture, bytes):
            raise ValueError(f"{source.name(line)} holds a picture itself; give a file that names pictures by their paths")
        return os.path.relpath(root / picture, folder)

    return [{"text": one.text, **({"images": [*map(path, one.images)]} if one.images else {})} for one in found.each()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file; faults of the input end in a message."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with told_by(parser):
        _mine(options)


def _mine(options: argparse.Namespace) -> None:
    check_number("--count", options.count, least=1, whole=True)
    data = PairsFile(options.pairs, options.image_root)
    with trusting(options.trust):
        run = open_run(options.run, build)
    model, pairs = run.view.model, run.view.pairs
    if not isinstance(pairs, EmbeddingCollator):
        raise ValueError(f"--run {options.run}: this is no stage that embeds; take one of the stage embed")
    source = ModelSource(
        run=str(options.run), model=None, template=None, system=None, tokenizer=None, pictures=None, encoder=None, decoder=None,
        device=options.device, dtype="auto", matmul_precision="high",
    )  # fmt: skip
    place = place_for(source, run.settings.trainer.precision)
    found = embed_samples(place.put(model), pairs, data, place.precision)
    wrong = nearest_wrong(found, options.count, options.margin)
    records = mined_records(data, wrong, options.out.parent)
    write_text(options.out, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))
    print(f"{sum(map(len, wrong))} wrong documents of {len(wrong)} queries: {options.out}")


def _parser() -> argparse.ArgumentParser:
    program = "python -m lightning_internvl.inference.mine_negatives"
    parser = argparse.ArgumentParser(prog=program, description="Find wrong documents that are near to queries.")
    parser.add_argument("--run", type=Path, required=True, help="a run, or the hand-off folder of its stage embed")
    parser.add_argument("--pairs", required=True, help="the file that the stage embed reads (docs/embed.md)")
    parser.add_argument("--out", type=Path, required=True, help="the same records with wrong documents, as JSONL")
    parser.add_argument("--count", type=int, default=4, help="wrong documents of each query, at most")
    parser.add_argument("--margin", type=float, default=0.05, help="how much less similar than the right one they must be")
    parser.add_argument("--image-root", help="where paths of pictures start, if not at the file")
    parser.add_argument("--device", default="auto", help="cpu, cuda; by default a GPU where there is one")
    parser.add_argument("--trust", action="append", default=[], help="a package whose code the run may name (SECURITY.md)")
    return parser


if __name__ == "__main__":
    main()
