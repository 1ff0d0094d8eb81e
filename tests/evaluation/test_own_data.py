"""Questions of a user's held-out data: which are asked, how answers are scored, and what is good for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_internvl.evaluation.metrics.token_f1 import token_f1
from lightning_internvl.evaluation.own_data import (
    Asked,
    answer_scores,
    failure,
    is_repetition,
    keep_cases,
    sample_of,
    turns_of,
)
from lightning_internvl.inference.journal import Journal


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("A cat.", "the cat", 1.0),
        ("a black cat", "a cat on a mat", 0.4),  # of 2 and of 3 words one
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("?", "?", 1.0),
    ],
)
def test_token_f1(answer: str, truth: str, score: float) -> None:
    assert token_f1(answer, truth) == pytest.approx(score)
    assert token_f1(truth, answer) == pytest.approx(score)


def told(truth: str, answer: str, picture: bool = True) -> Asked:
    images = [np.zeros((4, 4, 3), np.uint8)] if picture else []
    return Asked({"images": images}, "what?", truth, answer)


def test_each_question_comes_with_what_was_said_and_shown_before() -> None:
    first, second = (np.full((4, 4, 3), value, np.uint8) for value in (1, 2))
    said = ["<image>\nwhat?", " a cat ", "and <image>?", "a dog"]
    roles = ("user", "assistant") * 2
    turns: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    one, two = turns_of({"images": [first, second], "conversation": turns, "key": "k"})
    assert (one.question, one.truth, len(one.sample["images"])) == ("what?", "a cat", 1)
    assert (two.question, two.truth, len(two.sample["images"])) == ("and ?", "a dog", 2)
    assert two.picture is second
    assert two.sample["conversation"] == turns[:3]


def test_short_answers_are_compared_word_for_word_and_longer_ones_by_their_words() -> None:
    asked = [told("red", "red"), told("red", "Red"), told("a red car on grass", "the red car on a lawn")]
    assert [one.right for one in asked] == [True, False, True]
    scores = answer_scores(asked)
    assert scores["validation_exact_match"] == 0.5
    assert scores["validation_token_f1"] == pytest.approx((1 + 1 + 0.75) / 3)
    assert scores["validation_answers"] == 3
    assert answer_scores([]) == {}
    assert "validation_exact_match" not in answer_scores(asked[2:])


def test_text_without_a_picture_is_kept_as_well() -> None:
    journal, asked = Journal(cases=1), [told("red", "red", picture=False), told("red", "blue")]
    keep_cases(asked, journal)
    assert [(case["right"], bool(case["png"])) for case in journal.shown] == [(True, False), (False, True)]
    assert [answer["correct"] for (answer,) in sample_of(asked)["answers"]] == [True, False]


@pytest.mark.parametrize("text", ["", "sssss s", "abababab", "the cat " * 4])
def test_repetitions(text: str) -> None:
    assert is_repetition(text)


@pytest.mark.parametrize("text", ["no", "see", "3", "a cat and a dog on the grass", "the dog sees the cat and the bird"])
def test_answers(text: str) -> None:
    assert not is_repetition(text)


def test_what_is_good_for_nothing_is_told() -> None:
    assert "repeat the same letters" in failure([told("red", "sssssss")] * 3, 4.0, 4.1)
    assert "all 3 questions got the same answer" in failure([told(t, "no") for t in ("red", "green", "blue")], 1.0, 4.0)
    wrong = [told("red", "blue"), told("green", "red")]
    assert "the loss is 3.9 after 4: it has learnt next to nothing" in failure(wrong, 3.9, 4.0)
    assert not failure(wrong, 1.0, 4.0)  # it has learnt something, and may need more
    assert not failure(wrong, 3.9, None)
    assert not failure([*wrong, told("red", "red")], 3.9, 4.0)
