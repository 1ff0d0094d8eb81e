"""Models that see nothing: no task that is judged on features gives them more than its chance level, and NaN is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from seeing_toys import measured, seeing_predictor
from torch import Tensor

from lightning_internvl.evaluation.classification import ZeroShotClassification, class_scores
from lightning_internvl.evaluation.probing import FeatureProbe
from lightning_internvl.evaluation.retrieval import ImageTextRetrieval, best_of_both, recalls
from lightning_internvl.evaluation.segmentation import Segmentation, mask_scores
from lightning_internvl.evaluation.tasks import Matching, Retrieval, ZeroShot, nearest_others
from lightning_internvl.evaluation.video import ZeroShotVideo
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.middleware.beam_search import write

TASKS: dict[str, Callable[[], Any]] = {
    "zero_shot": lambda: ZeroShotClassification(),
    "retrieval": lambda: ImageTextRetrieval(rerank=4),
    "video": lambda: ZeroShotVideo(samples=48, frames=(1, 2)),
    "probe": lambda: FeatureProbe(epochs=1, train_samples=48),
    "segmentation": lambda: Segmentation(samples=8, steps=2, batch_size=4),
    "zero_shot of a stage": lambda: ZeroShot(),
    "retrieval of a stage": lambda: Retrieval(mode="g", name="g"),
    "matching of a stage": lambda: Matching(),
}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return seeing_predictor()


@pytest.mark.parametrize("task", TASKS)
def test_a_tower_that_sees_nothing_is_not_above_chance(task: str, predictor: Predictor) -> None:
    found = measured(TASKS[task](), predictor, 0.1)
    levels = {name.removesuffix("_chance"): value for name, value in found.items() if name.endswith("_chance")}
    assert levels
    assert {name: found[name] for name in levels if found[name] > levels[name] + 1e-6} == {}


@pytest.mark.parametrize("task", TASKS)
def test_nan_is_an_error(task: str, predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="are NaN or infinite: the weights are damaged"):
        measured(TASKS[task](), predictor, float("nan"))


def test_ties_count_against_the_model() -> None:
    same = torch.full((6, 4), 0.5)
    places = [best[1] for best in best_of_both(same, same, 3)]
    owner = torch.arange(6)
    assert all(found == 0 for name, found in recalls("", *places, owner, (1, 3)).items() if "chance" not in name)
    for size in (1.0, 3e4):  # of logits, as those of a probe
        found = class_scores("", torch.full((6, 3), size), torch.tensor([0, 0, 0, 1, 1, 2]), (1, 2))
        assert (found["top1"], found["top2"], found["mean_per_class"]) == (0, 0, 0)


def test_classes_of_unequal_size_raise_the_chance_level() -> None:
    labels = torch.tensor([0] * 19 + [1])
    blind = torch.tensor([[1.0, 0.0]]).expand(20, 2)
    found = class_scores("", blind, labels, (1,))
    assert found["top1"] == pytest.approx(found["top1_chance"]) == pytest.approx(0.95)


def test_drawn_classes_are_not_above_the_chance_of_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    truth = torch.multinomial(shares, 20_000, replacement=True, generator=generator)
    for weights in (shares, torch.full((4,), 0.25)):
        said = torch.multinomial(weights, 20_000, replacement=True, generator=generator)
        found = mask_scores(torch.bincount(truth * 4 + said, minlength=16).view(4, 4))
        assert found["miou"] < found["miou_chance"] + 0.01


@pytest.mark.parametrize("beams", [1, 2])
def test_captions_of_a_model_of_nan_are_an_error(beams: int) -> None:
    class Broken:
        def __call__(self, ids: Tensor) -> Tensor:
            return torch.full((len(ids), 9), float("nan"))

        def reorder(self, rows: Tensor) -> None: ...

    with pytest.raises(ValueError, match="2 of 2 rows of next-token logits are NaN"):
        write(Broken(), torch.ones(2, 3, dtype=torch.long), max_new_tokens=4, eos_id=2, num_beams=beams)


def test_wrong_captions_are_near_and_each_comes_once() -> None:
    scores = torch.tensor([[9.0, 8, 1], [7, 9, 6], [2, 3, 9]])
    assert nearest_others(scores) == [1, 2, 0]  # 0 with 1 (8), 1 with 0 (7); 2 is left alone and changes with 1
    for seed in range(20):
        count = 2 + seed
        found = nearest_others(torch.rand(count, count, generator=torch.Generator().manual_seed(seed)))
        assert sorted(found) == list(range(count))
        assert all(place != other for place, other in enumerate(found))
    assert sorted(nearest_others(torch.zeros(5, 5))) == list(range(5))
