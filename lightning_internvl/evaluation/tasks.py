"""The measures of held-out data at the end of stages, each beside its chance level.

Scores and names are those of the tasks of `evaluate.py` (`classification`, `retrieval`,
`captions`), which also read public sets.

A task is called with a `Predictor` and returns plain numbers by name; `<name>_chance` stands beside
`<name>` where chance has a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_accuracy

from lightning_internvl.data.grounding import box_of, overlap
from lightning_internvl.data.scenes.language import CAPTION_REQUEST, Turn
from lightning_internvl.evaluation.captions import caption_scores
from lightning_internvl.evaluation.classification import top_k_accuracy, zero_shot_scores
from lightning_internvl.evaluation.retrieval import best_of_both, recalls
from lightning_internvl.inference.predictor import Metrics, Predictor
from lightning_internvl.objectives import similarities


class ZeroShot:
    """Naming a picture by the nearest class, the mean of its prompts (CLIP section 3.1.4)."""

    needs = "pairs"

    def __init__(self, *, mode: str = "c", top_k: Sequence[int] = (1, 5)) -> None:
        self.mode, self.top_k = mode, tuple(top_k)

    def __call__(self, predictor: Predictor) -> Metrics:
        data = predictor.held_out.labelled()
        scores = zero_shot_scores(predictor, data.images, data.prompts, self.mode)
        return top_k_accuracy("zero_shot_", scores, torch.tensor(data.labels), self.top_k)


class Probe:
    """Naming a picture by a classifier that has learned on the tower's features."""

    needs = "labels"

    def __init__(self, *, top_k: Sequence[int] = (1, 5)) -> None:
        self.top_k = tuple(top_k)

    def __call__(self, predictor: Predictor) -> Metrics:
        data = predictor.held_out.labelled()
        scores, labels = predictor.classify(data.images).cpu(), torch.tensor(data.labels)
        return top_k_accuracy("probe_", scores, labels, self.top_k)


class Retrieval:
    """Recall at k over pictures and captions that fit one to one, in both directions.

    Args:
        mode: "c" or "g", the image embedding.
        split, language: which held-out captions.
        name: prefix of the metrics.
    """

    needs = "pairs"

    def __init__(
        self, *, mode: str, name: str, split: str = "scenes", language: str = "en", top_k: Sequence[int] = (1, 5, 10)
    ) -> None:
        self.mode, self.name, self.split, self.language, self.top_k = mode, name, split, language, tuple(top_k)

    def __call__(self, predictor: Predictor) -> Metrics:
        data = predictor.held_out.captioned(self.split, self.language)
        image = predictor.embed_images(data.images, self.mode)
        text = predictor.embed_texts(data.captions)
        (_, captions), (_, images) = best_of_both(image, text, max(self.top_k))
        return recalls(f"{self.name}_", captions, images, torch.arange(len(text)), self.top_k)


class Matching:
    """ITM accuracy: for every picture its own caption, and one of the nearest of all others. Every
    caption is shown once as the right one and once as a wrong one, so that what reads captions
    alone is right half of the time."""

    needs = "pairs"

    def __call__(self, predictor: Predictor) -> Metrics:
        data = predictor.held_out.captioned()
        image = predictor.embed_images(data.images, "g")
        scores = similarities(image, predictor.embed_texts(data.captions))
        matched = predictor.match(data.images, data.captions)
        others = [data.captions[place] for place in nearest_others(scores)]
        wrong = predictor.match(data.images, others)
        rows = zip(data.images, data.captions, matched.tolist(), others, wrong.tolist(), strict=True)
        for image, own, chance, other, chance_of_other in rows:
            for caption, found, truth in ((own, chance, "yes"), (other, chance_of_other, "no")):
                answer, question = "yes" if found > 0.5 else "no", f"Does this belong to the picture: {caption}"
                told = {"question": question, "answer": f"{answer} ({found:.0%})", "truth": truth}
                predictor.journal.show(image, **told, right=answer == truth)
        labels = torch.cat([torch.ones_like(matched), torch.zeros_like(wrong)]).long()
        accuracy = binary_accuracy(torch.cat([matched, wrong]), labels)
        return {"itm_hard_accuracy": accuracy.item(), "itm_hard_accuracy_chance": 0.5}


def nearest_others(scores_NN: Tensor) -> list[int]:
    """For every picture the caption of another one, each caption once: the most similar pairs of all
    come first."""
    count = len(scores_NN)
    found, free = [-1] * count, set(range(count))
    for place in scores_NN.flatten().argsort(descending=True, stable=True).tolist():
        picture, caption = divmod(place, count)
        if found[picture] < 0 and caption in free and picture != caption:
            found[picture] = caption
            free.remove(caption)
            if not free:
                return found
    alone = found.index(-1)  # only its own caption is left: it changes with the picture before or after
    other = alone - 1 if alone else 1
    found[alone], found[other] = found[other], alone
    return found


class Captioning:
    """CIDEr and exact match of written captions.

    Args:
        writer: "middleware" (QLLaMA continues its caption prompt) or "decoder" (it is asked to
            describe the picture).
        search: how the middleware chooses its tokens, beside the default (published captions of
            QLLaMA: num_beams 5, min_new_tokens 8, max_new_tokens 30).
    """

    needs = "captions"

    def __init__(self, *, writer: str, split: str = "scenes", images: int = 250, search: Mapping[str, Any] | None = None) -> None:
        if writer not in ("middleware", "decoder"):
            raise ValueError(f"{writer=} is not known; valid choices: middleware, decoder")
        if search and writer != "middleware":
            raise ValueError(f"{search=} is for captions of the middleware, not of the {writer}")
        self.writer, self.split, self.images, self.search = writer, split, images, dict(search or {})

    def __call__(self, predictor: Predictor) -> Metrics:
        data = predictor.held_out.captioned(self.split)
        images, references = data.images[: self.images], data.references[: self.images]
        written = write_captions(predictor, images, self.writer, **self.search)
        return caption_scores(written, references)


class Answering:
    """Share of right answers, overall and by kind of question, beside the share that the commonest
    answer of each kind gets.

    An answer that is a box counts as right from an overlap (IoU) of `iou` with the true box on.
    """

    needs = "chats"

    def __init__(self, *, split: str = "scenes", iou: float = 0.5) -> None:
        self.split, self.iou = split, iou

    def __call__(self, predictor: Predictor) -> Metrics:
        data = predictor.held_out.questioned(self.split)
        answers = predictor.answer(data.images, [turn.question for turn in data.turns])
        said = zip(data.turns, answers, strict=True)
        right = [is_right(turn, answer, self.iou) for turn, answer in said]
        for image, turn, answer, hit in zip(data.images, data.turns, answers, right, strict=True):
            texts = {"question": turn.question, "answer": answer, "truth": turn.answer}
            predictor.journal.show(image, **texts, right=hit)
        kinds = sorted({turn.kind for turn in data.turns})
        share = {kind: [r for r, t in zip(right, data.turns, strict=True) if t.kind == kind] for kind in kinds}
        commonest = {kind: self._commonest([t for t in data.turns if t.kind == kind]) for kind in kinds}
        weighted = sum(commonest[kind] * len(share[kind]) for kind in kinds) / len(right)
        metrics = {"answers_accuracy": sum(right) / len(right), "answers_accuracy_chance": weighted}
        for kind in kinds:
            metrics |= {f"answers_{kind}": sum(share[kind]) / len(share[kind]), f"answers_{kind}_chance": commonest[kind]}
        return metrics

    def _commonest(self, turns: list[Turn]) -> float:
        """The best that one answer to all questions of a kind gets: the commonest, or of boxes the
        one that overlaps most often."""
        return max(sum(is_right(turn, one, self.iou) for turn in turns) for one in {turn.answer for turn in turns}) / len(turns)


def write_captions(predictor: Predictor, images: Any, writer: str, **search: Any) -> list[str]:
    """Captions by the middleware or by the decoder."""
    if writer == "middleware":
        return predictor.caption(images, **search)
    return predictor.answer(images, [CAPTION_REQUEST] * len(images), max_new_tokens=24)


def is_right(turn: Turn, answer: str, iou: float = 0.5) -> bool:
    """Whether an answer is the true one, or a box that overlaps the true box enough."""
    if turn.box is None:
        return answer == turn.answer
    box = box_of(answer)
    return box is not None and overlap(box, turn.box) >= iou
