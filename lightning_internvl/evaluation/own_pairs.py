"""Pairs of the user's own that are held out, before the model as held-out scenes are: for samples
over time and for cases of matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_internvl.data.scenes.held_out import CaptionedImages
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.evaluation.own_data import OwnData
from lightning_internvl.evaluation.tasks import Matching
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Metrics, Precision, Predictor


class OwnPairs:
    """Pairs in place of `HeldOutScenes`.

    Args:
        samples: as a dataset of pairs gives them.
    """

    def __init__(self, samples: Sequence[dict[str, Any]]) -> None:
        captions = [one["caption"] for one in samples]
        references = [[caption] for caption in captions]
        self.pairs = CaptionedImages([one["image"] for one in samples], captions, references)

    def captioned(self) -> CaptionedImages:
        """All of them."""
        return self.pairs


def pairs_predictor(own: OwnData, count: int) -> Predictor | None:
    """The model with at most so many held-out pairs, of each picture and of each caption one, spread
    over all; None in a stage that learns from no pairs, or where there are less than two."""
    if not own.reads_pairs:
        return None
    samples: list[dict[str, Any]] = []
    seen: set[tuple[str, Any]] = set()
    for place in own.places(count):
        try:
            sample = captioned(own.held_out[place])
        except ValueError as error:
            own.unusable[place] = str(error)
            continue
        if sample is None:
            continue
        names = {("picture", sample.get("image_id", place)), ("caption", sample["caption"])}
        if not seen & names:
            samples.append(sample)
            seen |= names
    held_out: Any = OwnPairs(samples)  # which has what tasks of pairs ask for
    return Predictor(own.view.model, held_out, pairs=own.view.pairs) if len(samples) > 1 else None


def captioned(sample: dict[str, Any]) -> dict[str, Any] | None:
    """A sample as a picture and its caption; None of a query and a document that are something else."""
    if "query" not in sample:
        return sample
    query, positive = sample["query"], sample["positive"]
    if query["images"] or len(positive["images"]) != 1 or positive["text"] != IMAGE:
        return None
    return {"image": positive["images"][0], "caption": query["text"]}


def matching(own: OwnData, precision: Precision, journal: Journal, count: int) -> Metrics:
    """`validation_itm_hard_accuracy` beside its chance level, with right and wrong cases for the
    journal; nothing of a stage that does not match."""
    if "itm" not in own.view.model.objectives or (predictor := pairs_predictor(own, count)) is None:
        return {}
    with predictor.evaluating(precision, journal):
        return {f"validation_{name}": value for name, value in Matching()(predictor).items()}
