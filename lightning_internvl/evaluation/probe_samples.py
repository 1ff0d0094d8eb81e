"""What a model makes of a few fixed pictures at one moment of training, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.scenes.held_out import AskedImages
from lightning_internvl.data.scenes.language import Turn
from lightning_internvl.evaluation.tasks import is_right, write_captions
from lightning_internvl.inference.journal import thumbnail
from lightning_internvl.inference.predictor import Predictor, as_sample
from lightning_internvl.inference.relevance import of_answer, of_caption, of_similarity
from lightning_internvl.objectives import similarities

POOL = 64  # pictures among which the nearest to a caption are found, the fixed ones among them
NEAREST = 4  # that are kept of each caption
SIDE = 96  # of their pictures


def sample(
    predictor: Predictor, *, stage: str, step: int, mode: str, writer: str | None, images: int = 10, relevance: bool = False
) -> dict[str, Any]:
    """Similarities, nearest pictures, captions and answers for the first held-out pictures.

    Args:
        mode: image embedding of the similarities, "c" or "g".
        writer: who writes captions, "middleware" or "decoder"; None writes none.
        relevance: whether it is also found what in the pictures the scores of true texts hang on.
    """
    data = predictor.held_out.captioned()
    probes, captions = data.images[:images], data.captions[:images]
    found: dict[str, Any] = {"stage": stage, "step": step, "images": [thumbnail(p) for p in probes], "captions_true": captions}
    if writer != "decoder":
        pool = data.images[: max(POOL, images)]
        scores = similarities(predictor.embed_images(pool, mode), predictor.embed_texts(captions))
        found["similarity"] = [[round(v, 4) for v in row] for row in scores[: len(probes)].tolist()]
        found["neighbours"] = _neighbours(scores, pool)
    if writer is not None:
        found["captions"] = write_captions(predictor, probes, writer)
    asked = predictor.held_out.questioned() if writer == "decoder" else None
    if asked is not None:
        found["answers"] = _answers(predictor, asked, images)
    if relevance:
        turns = asked.turns[:images] if asked is not None else []
        found["relevance"] = _relevance(predictor, probes, captions, turns, mode, writer)
    return found


def _relevance(
    predictor: Predictor, probes: Pictures, captions: Sequence[str], turns: Sequence[Turn], mode: str, writer: str | None
) -> dict[str, Any]:
    """What the score of each true text hangs on: `of`, its kind, and a grid for each picture, or
    None (see `lightning_internvl.inference.relevance`)."""
    if writer == "decoder":
        asked = [(as_sample([p], turn.question, "probe"), turn.answer) for p, turn in zip(probes, turns, strict=False)]
        return {"of": "answer", "grids": [of_answer(predictor, *one) for one in asked]}
    if writer == "middleware":
        return {"of": "caption", "grids": [of_caption(predictor, *pair) for pair in zip(probes, captions, strict=True)]}
    texts = predictor.embed_texts(captions)
    pairs = zip(probes, texts[:, None], strict=True)
    return {"of": "similarity", "grids": [of_similarity(predictor, *pair, mode) for pair in pairs]}


def _answers(predictor: Predictor, asked: AskedImages, images: int) -> list[list[dict[str, Any]]]:
    turns = asked.turns[:images]
    answers = predictor.answer(asked.images[:images], [turn.question for turn in turns])
    return [
        [{"question": t.question, "truth": t.answer, "answer": a, "correct": is_right(t, a)}]
        for t, a in zip(turns, answers, strict=True)
    ]


def _neighbours(scores_NC: Tensor, pictures: Pictures) -> dict[str, Any]:
    """The pictures nearest to each caption, whose own picture has its place: `ranked`, (place, score)
    of the first ones; `ranks`, from 1 on, that of the own picture; and the `pictures` by place."""
    order_CN = scores_NC.T.argsort(dim=1, descending=True, stable=True)
    ranked = [
        [(place, round(float(scores_NC[place, caption]), 4)) for place in row[:NEAREST]]
        for caption, row in enumerate(order_CN.tolist())
    ]
    ranks = [row.index(caption) + 1 for caption, row in enumerate(order_CN.tolist())]
    shown = sorted({place for row in ranked for place, _ in row})
    return {
        "among": len(pictures),
        "ranked": ranked,
        "ranks": ranks,
        "pictures": {str(place): thumbnail(pictures[place], SIDE) for place in shown},
    }
