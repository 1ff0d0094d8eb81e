"""What answers are worth by the built-in rules, and functions that fail are named with sample and answer."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_internvl.stages import rewards

ASKED = {"key": "train/7", "conversation": []}


@pytest.mark.parametrize(
    ("answer", "truth", "worth"),
    [("Two.", "two", 1.0), (" a  red cat", "A red cat", 1.0), ("two cats", "two", 0.0), ("", "two", 0.0)],
)
def test_the_exact_answer(answer: str, truth: str, worth: float) -> None:
    assert rewards.exact_answer(answer, truth, ASKED) == worth


@pytest.mark.parametrize(
    ("answer", "truth", "worth"),
    [
        ("there are three cats", "3", 1.0), ("3", "three", 1.0), ("no", "0", 1.0), ("zero", "no", 1.0), ("2.5 m", "2,5", 1.0),
        ("someone", "one", 0.0), ("four or five", "5", 0.0), ("-3", "3", 0.0), ("many", "3", 0.0),
    ],
)  # fmt: skip
def test_the_count(answer: str, truth: str, worth: float) -> None:
    assert rewards.count(answer, truth, ASKED) == worth


def box(*corners: int) -> str:
    return "<box>({},{}),({},{})</box>".format(*corners)


@pytest.mark.parametrize(
    ("answer", "truth", "worth"),
    [
        (box(0, 0, 500, 500), box(0, 0, 500, 500), 1.0),
        (box(0, 0, 500, 500), box(0, 0, 500, 1000), 0.5),
        (box(0, 0, 500, 500), box(500, 500, 1000, 1000), 0.0),
        # each with the nearest, over the larger number
        (box(0, 0, 500, 1000) + box(0, 0, 500, 500), box(0, 0, 500, 500) + box(600, 0, 700, 100), 0.5),
        (box(0, 0, 500, 500) + box(0, 0, 500, 500), box(0, 0, 500, 500), 0.5),
        ("nowhere", box(0, 0, 500, 500), 0.0),
        ("<box>(0,0),(5", box(0, 0, 500, 500), 0.0),
        (box(900, 0, 500, 500), box(0, 0, 500, 500), 0.0),
    ],
)
def test_the_overlap_of_boxes(answer: str, truth: str, worth: float) -> None:
    assert rewards.box_overlap(answer, truth, ASKED) == pytest.approx(worth)


def test_the_format_of_the_whole_answer() -> None:
    pattern = "<think>.*</think>.+"
    assert rewards.answer_format("<think>a\nb</think> two", "", ASKED, pattern=pattern) == 1.0
    assert rewards.answer_format("so <think>a</think> two", "", ASKED, pattern=pattern) == 0.0


@pytest.mark.parametrize(("function", "what"), [(rewards.count, "number"), (rewards.box_overlap, "box")])
def test_a_truth_that_a_rule_cannot_judge_is_named(function: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"mine: sample train/7, answer '2': ValueError: the true answer 'red' has no {what}"):
        rewards.reward_of("mine", function, "2", "red", ASKED)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda answer, truth, asked: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda answer, truth, asked: float("nan"), "it gave nan; a reward must be a finite number"),
        (lambda answer, truth, asked: None, "it gave None, which is no number"),
        (lambda answer: 1.0, "TypeError"),
    ],
)
def test_a_function_that_fails_is_named_with_sample_and_answer(function: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=f"reward mine: sample train/7, answer 'blue': .*{fault}"):
        rewards.reward_of("mine", function, "blue", "red", ASKED)


def test_rewards_have_weights_of_their_own() -> None:
    functions = {"exact": rewards.exact_answer, "count": rewards.count}
    assert rewards.checked_weights(functions, {"count": 0.5}, "stages.reward.module") == {"exact": 1.0, "count": 0.5}
    for given, weights, fault in (
        ({}, None, "module.rewards names no function"),
        ({"exact": "exact_answer"}, None, "module.rewards.exact='exact_answer' is no function; give {_target_"),
        (functions, {"counts": 1.0}, "module.reward_weights has 'counts'; did you mean 'count'"),
        (functions, {"count": "high"}, "module.reward_weights.count='high' must be a number"),
    ):
        with pytest.raises(ValueError, match=fault):
            rewards.checked_weights(given, weights, "module")  # type: ignore[arg-type]  # as a user may give it
