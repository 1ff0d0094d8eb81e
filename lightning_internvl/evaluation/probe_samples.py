"""What a model makes of a few fixed pictures at one moment of training, for the report."""

from __future__ import annotations

from typing import Any

from lightning_internvl.data.scenes.held_out import AskedImages, CaptionedImages
from lightning_internvl.evaluation.tasks import is_right, write_captions
from lightning_internvl.inference.journal import thumbnail
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.objectives import similarities


def sample(
    predictor: Predictor, *, stage: str, step: int, mode: str, writer: str | None, images: int = 10, last: bool = False
) -> dict[str, Any]:
    """Similarities, captions and answers for the probe pictures; at the end also retrieval.

    Args:
        mode: image embedding of the similarities, "c" or "g".
        writer: who writes captions, "middleware" or "decoder"; None writes none.
    """
    data = predictor.held_out.captioned()
    probes, captions = data.images[:images], data.captions[:images]
    found: dict[str, Any] = {"stage": stage, "step": step, "images": [thumbnail(p) for p in probes], "captions_true": captions}
    if writer != "decoder":
        similarity = similarities(predictor.embed_images(probes, mode), predictor.embed_texts(captions))
        found["similarity"] = [[round(v, 4) for v in row] for row in similarity.tolist()]
    if writer is not None:
        found["captions"] = write_captions(predictor, probes, writer)
    if writer == "decoder":
        found["answers"] = _answers(predictor, predictor.held_out.questioned(), images)
    if last and writer != "decoder":
        found["retrieval"] = _retrieval(predictor, data, mode)
    return found


def _answers(predictor: Predictor, asked: AskedImages, images: int) -> list[list[dict[str, Any]]]:
    turns = asked.turns[:images]
    answers = predictor.answer(asked.images[:images], [turn.question for turn in turns])
    return [
        [{"question": t.question, "truth": t.answer, "answer": a, "correct": is_right(t, a)}]
        for t, a in zip(turns, answers, strict=True)
    ]


def _retrieval(predictor: Predictor, data: CaptionedImages, mode: str, queries: int = 6, shown: int = 5) -> list[dict[str, Any]]:
    scores = similarities(predictor.embed_images(data.images, mode), predictor.embed_texts(data.captions[:queries])).T
    rows = []
    for truth, (text, row) in enumerate(zip(data.captions, scores, strict=False)):
        best, places = row.topk(min(shown, len(row)))
        ranked = [
            {"png": thumbnail(data.images[place]), "score": round(score, 4), "correct": place == truth}
            for score, place in zip(best.tolist(), places.tolist(), strict=True)
        ]
        rows.append({"text": text, "truth": truth, "ranked": ranked})
    return rows
