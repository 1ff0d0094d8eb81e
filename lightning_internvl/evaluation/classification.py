"""Naming pictures by sentences alone, and the scores of any classifier.

Letters: N pictures, C classes, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.data.files.class_folder import read_class_folder
from lightning_internvl.data.files.class_prompts import prompts, read_prompts
from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.scenes.language import LANGUAGES
from lightning_internvl.evaluation.features import TaskPictures, scenes_of, share_of, ties_against
from lightning_internvl.inference.predictor import Metrics, Predictor
from lightning_internvl.messages import check_choice
from lightning_internvl.objectives import similarities


class ZeroShotClassification:
    """Naming a picture by the nearest class, the mean of its prompts (CLIP, section 3.1.4).

    Args:
        path: a folder with one folder a class; None: the built-in pictures of single things.
        names: a file with the names of the classes; None: those of the folders.
        templates: what is said about a class, a set of
            `lightning_internvl.data.files.class_prompts` or a file; the built-in things have
            sentences of their own.
        language: of those sentences.
        mode: the image embedding, "c" or "g" where the model has both.
        samples: only that many pictures, spread over the classes (built-in things take turns, so
            the first ones are).
        max_missing: the share of pictures that may be unreadable.
    """

    needs = "pairs"

    def __init__(
        self,
        *,
        path: str | None = None,
        names: str | None = None,
        templates: str = "imagenet",
        language: str = "en",
        mode: str = "c",
        top_k: Sequence[int] = (1, 5),
        samples: int | None = None,
        max_missing: float = 0.01,
        version: int = 2,
    ) -> None:
        if path is None and names is not None:
            given = f"names={names}"
            raise ValueError(f"{given} are of the classes of a folder; give path=FOLDER with them")
        if path is not None:
            read_prompts(templates)  # a wrong word is told before anything is loaded
        check_choice("language", language, LANGUAGES)
        self.path, self.names, self.templates, self.language, self.mode = path, names, templates, language, mode
        self.top_k, self.samples, self.max_missing = tuple(top_k), samples, max_missing

    def __call__(self, predictor: Predictor) -> Metrics:
        if self.path is None:
            data = scenes_of(predictor).labelled(self.language)
            images, labels = data.images[: self.samples], data.labels[: self.samples]
            said = data.prompts
            names, total = [texts[0] for texts in said], len(data.images)
        else:
            folder = read_class_folder(self.path, self.names, self.samples)
            images, labels, names, total = folder.images, folder.labels, folder.names, folder.total
            said = prompts(names, self.templates)
        asked = TaskPictures(predictor, images, self.max_missing)
        scores = zero_shot_scores(predictor, asked.images, said, self.mode)
        return score_pictures("zero_shot_", asked, scores, labels, names, self.top_k) | {"samples_asked": total}


def zero_shot_scores(predictor: Predictor, images: Pictures, prompts_of_classes: Sequence[Sequence[str]], mode: str) -> Tensor:
    """Similarities (N, C), float32 on the CPU, of pictures and classes."""
    embeds = predictor.embed_images(images, mode)
    return similarities(embeds, classifier(predictor, prompts_of_classes)).float().cpu()


def score_pictures(
    name: str,
    asked: TaskPictures,
    scores_NC: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    top_k: Sequence[int],
    question: str = "which class?",
) -> Metrics:
    """The scores of the samples that could be read, and how many; answers are noted."""
    kept = asked.readable()
    scores, truth = scores_NC[kept], torch.tensor(labels)[kept]
    best = given_classes(scores, truth)
    answers, truths = ([names[place] for place in places.tolist()] for places in (best, truth))
    asked.keep_answers(question, answers, truths, (best == truth).tolist())
    return class_scores(name, scores, truth, top_k) | {"samples": len(kept)}


def classifier(predictor: Predictor, said: Sequence[Sequence[str]]) -> Tensor:
    """The prompts of every class -> (C, E): the normalised mean of normalised prompts."""
    embeds = predictor.embed_texts([text for texts in said for text in texts])
    if embeds.ndim == 3:
        raise ValueError("a class is the mean of its prompts, and late interaction embeds no text as a whole; use task=retrieval")
    means = [own.mean(dim=0) for own in embeds.split([len(texts) for texts in said])]
    return F.normalize(torch.stack(means), dim=-1)


def class_scores(name: str, scores_NC: Tensor, labels_N: Tensor, top_k: Sequence[int] = (1, 5)) -> Metrics:
    """Share of pictures whose class is among the best k, and the mean of the classes' own shares,
    each beside its chance.

    Args:
        name: prefix of the metrics.
    """
    classes = scores_NC.shape[1]
    right = given_classes(scores_NC, labels_N) == labels_N
    shown = torch.bincount(labels_N, minlength=classes)
    hits = torch.bincount(labels_N, weights=right.double(), minlength=classes)
    there = shown > 0
    means = {f"{name}mean_per_class": (hits[there] / shown[there]).mean().item()}
    means[f"{name}mean_per_class_chance"] = 1 / int(there.sum())
    return top_k_accuracy(name, scores_NC, labels_N, top_k) | means


def top_k_accuracy(name: str, scores_NC: Tensor, labels_N: Tensor, top_k: Sequence[int]) -> Metrics:
    """Share of pictures whose class is among the best k, beside its chance: the k commonest classes
    everywhere. A tie counts as wrong.

    A k of as many classes as there are, or more, is left out: it would always be right.
    """
    classes = scores_NC.shape[1]
    scores = _ties_against(scores_NC, labels_N)
    commonest = torch.bincount(labels_N, minlength=classes).sort(descending=True).values.double() / len(labels_N)
    metrics: Metrics = {}
    for k in [k for k in top_k if k < classes]:
        right = scores.topk(k, dim=1).indices == labels_N[:, None]
        hits, chance = share_of(right.any(dim=1)), max(commonest[:k].sum().item(), k / classes)
        metrics |= {f"{name}top{k}": hits, f"{name}top{k}_chance": chance}
    return metrics


def given_classes(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The class that each picture is given, (N,); of a tie with the true one another."""
    return _ties_against(scores_NC, labels_N).argmax(dim=1)


def _ties_against(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    return ties_against(scores_NC, labels_N[:, None] == torch.arange(scores_NC.shape[1]))
