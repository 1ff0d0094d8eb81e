"""What towers get that see nothing, on every task judged on features.

`PYTHONPATH=. python tests/evaluation/blind_towers.py` prints their rows of the table of docs/evaluation.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from seeing_toys import measured, seeing_predictor

from lightning_internvl.evaluation.classification import ZeroShotClassification, class_scores
from lightning_internvl.evaluation.probing import FeatureProbe
from lightning_internvl.evaluation.retrieval import ImageTextRetrieval, best_of_both, recalls
from lightning_internvl.evaluation.segmentation import Segmentation, mask_scores
from lightning_internvl.evaluation.tasks import Matching
from lightning_internvl.evaluation.video import ZeroShotVideo

SCENES, SINGLE, SEEDS = 100, 144, 3
VALUE = 0.1  # that a blind tower gives everywhere


class Seeing(NamedTuple):
    """A task, the number that is told of it, and what scores that is right gets."""

    task: Callable[[], Any]
    measure: str
    perfect: Callable[[], float]


def right_classes() -> float:
    return class_scores("", torch.eye(9), torch.arange(9), (1,))["top1"]


def right_pairs() -> float:
    places = [best[1] for best in best_of_both(torch.eye(9), torch.eye(9), 1)]
    return recalls("", *places, torch.arange(9), (1,))["image_to_text_r1"]


def right_masks() -> float:
    return mask_scores(torch.diag(torch.arange(1, 10)))["miou"]


TASKS = {
    "zero_shot": Seeing(lambda: ZeroShotClassification(), "zero_shot_top1", right_classes),
    "retrieval": Seeing(lambda: ImageTextRetrieval(), "c_image_to_text_r1", right_pairs),
    "retrieval, text to picture": Seeing(lambda: ImageTextRetrieval(), "c_text_to_image_r1", right_pairs),
    "video": Seeing(lambda: ZeroShotVideo(samples=48, frames=(2,)), "frames2_top1", right_classes),
    "probe": Seeing(lambda: FeatureProbe(epochs=2, train_samples=192), "probe_top1", right_classes),
    "segmentation": Seeing(lambda: Segmentation(samples=24, steps=10, batch_size=8), "miou", right_masks),
    "matching of a stage": Seeing(lambda: Matching(), "itm_hard_accuracy", lambda: 1.0),
}


def main() -> None:
    predictors = [seeing_predictor(seed, SCENES, SINGLE) for seed in range(SEEDS)]
    print("| task | measure | perfect | constant | random | expected chance |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for name, (task, measure, perfect) in TASKS.items():
        blind = measured(task(), predictors[0], VALUE)
        drawn = mean(measured(task(), one, None)[measure] for one in predictors)
        values = perfect(), blind[measure], drawn, blind[f"{measure}_chance"]
        print(f"| `{name}` | {measure} | " + " | ".join(f"{value:.3f}" for value in values) + " |", flush=True)


if __name__ == "__main__":
    main()
