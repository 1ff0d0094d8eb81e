"""Models that see nothing get no more than the stated chance, on any number of any task judged on answers."""

from __future__ import annotations

from pathlib import Path

import blind_models
import pytest

QUESTIONS = 36


@pytest.mark.parametrize("name", [*blind_models.SCENES, *blind_models.FILES])
def test_no_constant_answer_is_above_chance(name: str, tmp_path: Path) -> None:
    found = blind_models.scores_of(blind_models.task_of(name, tmp_path, QUESTIONS))
    measure = blind_models.MEASURES.get(name, "accuracy")
    stated = {metric: chance for metric, chance in found.perfect.items() if metric.endswith("_chance")}
    assert f"{measure}_chance" in stated
    above = {
        (text, metric): (value, stated[f"{metric}_chance"])
        for text, own in found.constant.items()
        for metric, value in own.items()
        if f"{metric}_chance" in stated and value > stated[f"{metric}_chance"] + 1e-9
    }
    assert not above
    best, chance = found.perfect[measure], stated[f"{measure}_chance"]
    assert best > chance
    assert found.drawn[measure] <= chance + 0.25 * (best - chance)
