"""What metrics are called, and that those of the default recipe are all explained."""

from __future__ import annotations

import re

import pytest

from lightning_internvl.report.metric_words import TABLE, about, described, words


@pytest.mark.parametrize(
    ("name", "title", "said"),
    [
        ("c_image_to_text_r1", "captions found, R@1 (mode C)", "own caption is the nearest of all"),
        ("c_zh_text_to_image_r10", "pictures found, R@10 (mode C, Chinese)", "among the 10 nearest"),
        ("c_combinations_image_to_text_r5", "captions found, R@5 (mode C, new combinations)", "among the 5 nearest"),
        ("image_to_text_r5", "captions found, R@5", "among the 5 nearest"),
        ("zero_shot_top1", "zero-shot naming, top 1", "name is the nearest"),
        ("validation_itm_hard_accuracy", "matching, accuracy", "right judgements"),
        ("answers_count", "answers: how many", "most frequent answer"),
        ("accuracy_visual_reasoning", "answers, accuracy: visual reasoning", "rules of the benchmark"),
        ("train/grad_norm", "length of the gradient", "before it is clipped"),
    ],
)
def test_known_metrics_are_named_and_explained(name: str, title: str, said: str) -> None:
    assert words(name) == title
    assert said in about(name)


@pytest.mark.parametrize("name", ["odd{thing}", "my_own/metric", "c_image_to_text_r", "answers_of_mine"])
def test_an_unknown_name_stays_as_it_is(name: str) -> None:
    assert described(name) is None
    assert about(name) == ""
    assert words(name).replace(", ", "/").replace(" ", "_") == name


def test_every_row_of_the_table_can_be_reached_and_is_one_line() -> None:
    names = [re.sub(r"\(\?P<k>.*?\)", "1", pattern) for pattern, _, _ in TABLE]
    assert len(set(names)) == len(TABLE)
    assert all(len(text) < 120 and text.endswith(".") for _, _, text in TABLE)
