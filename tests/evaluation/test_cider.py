"""CIDEr-D against numbers of the COCO caption evaluation and against the formula written out slowly."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest

from lightning_internvl.evaluation.metrics.cider import cider, tokenize

CANDIDATES = [
    "two cats on a blue field",
    "a red car",
    "Three dogs, and one bird!",
    "tree",
    "",
    "a bus left of a bus left of a bus left of a bus",
]
REFERENCES = [
    ["two cats on a green field", "a pair of cats on green grass"],
    ["a red car", "one red car on the left"],
    ["three dogs and a bird", "one bird and three dogs on a blue field"],
    ["a tree", "one tall tree on a hill", "tree"],
    ["a house"],
    ["a bus left of a car", "a car right of a bus on a blue field"],
]
# What pycocoevalcap 1.2 (the COCO caption evaluation) gives for the same words.
GOLDEN_SCORES = [3.61041208, 4.85712801, 3.62635744, 1.98643937, 0.00000000, 0.84500700]
GOLDEN_MEAN = 2.48755732


def reference_cider(candidates: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
    """The formula with dense vectors over every n-gram seen anywhere: slow and obvious."""
    split = {text: tokenize(text) for text in [*candidates, *(text for texts in references for text in texts)]}

    def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
        return [tuple(split[text][i : i + n]) for i in range(len(split[text]) - n + 1)]

    scores = []
    for candidate, own_references in zip(candidates, references, strict=True):
        score = 0.0
        for n in range(1, 5):
            vocabulary = sorted({ngram for text in split for ngram in ngrams(text, n)})
            idf = []
            for ngram in vocabulary:
                pictures = sum(any(ngram in ngrams(text, n) for text in texts) for texts in references)
                idf.append(math.log(len(references)) - math.log(max(1, pictures)))
            mine = [ngrams(candidate, n).count(ngram) * w for ngram, w in zip(vocabulary, idf, strict=True)]
            for reference in own_references:
                theirs = [ngrams(reference, n).count(ngram) * w for ngram, w in zip(vocabulary, idf, strict=True)]
                norms = math.hypot(*mine) * math.hypot(*theirs)
                if norms > 0:
                    cosine = sum(min(m, t) * t for m, t in zip(mine, theirs, strict=True)) / norms
                    gap = len(ngrams(candidate, 2)) - len(ngrams(reference, 2))
                    score += cosine * math.exp(-(gap**2) / 72)
        scores.append(10 * score / 4 / len(own_references))
    return sum(scores) / len(scores), scores


def test_golden_numbers_of_the_coco_evaluation() -> None:
    mean, scores = cider(CANDIDATES, REFERENCES)
    assert scores == pytest.approx(GOLDEN_SCORES, abs=1e-6)
    assert mean == pytest.approx(GOLDEN_MEAN, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_slow_formula_on_random_sentences(seed: int) -> None:
    chance = random.Random(seed)
    words = [f"w{i}" for i in range(12)]

    def sentence(least: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(least, 9)))

    references = [[sentence(1) for _ in range(chance.randint(1, 3))] for _ in range(8)]
    candidates = [sentence(0) for _ in references]
    mean, scores = cider(candidates, references)
    slow_mean, slow_scores = reference_cider(candidates, references)
    assert scores == pytest.approx(slow_scores, abs=1e-9)
    assert mean == pytest.approx(slow_mean, abs=1e-9)


def test_a_perfect_caption_of_four_words_scores_ten() -> None:
    _, scores = cider(["a b c d", "x y z w"], [["a b c d"], ["e f g h"]])
    assert scores == pytest.approx([10.0, 0.0])


def test_one_picture_scores_zero_because_every_ngram_is_everywhere() -> None:
    assert cider(["a b c d"], [["a b c d"]]) == (0.0, [0.0])


def test_repeating_a_right_word_does_not_pay() -> None:
    references = [["one red car here"], ["two blue birds there"]]
    once, _ = cider(["red car", "x"], references)
    often, _ = cider(["red red red red car", "x"], references)
    assert often < once


def test_tokenize_lowers_and_removes_punctuation() -> None:
    assert tokenize(" It's a «Red-ish»  CAR, isn’t it?\n") == ["its", "a", "redish", "car", "isnt", "it"]


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "0 candidates"),
        (["a"], [["a"], ["b"]], "1 candidates and 2 lists"),
        (["a", "b"], [["a"], []], r"none for the pictures at \[1\]"),
    ],
)
def test_bad_input_is_named(candidates: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cider(candidates, references)


def test_another_process_gives_the_same_bits() -> None:
    """Whose hashes of texts, and with them the order of a set, are others."""
    draws = random.Random(0)
    texts = [" ".join(draws.choices("abcdefgh", k=30)) for _ in range(40)]
    references = [[text] for text in texts[20:]]
    code = f"from lightning_internvl.evaluation.metrics.cider import cider; print(cider({texts[:20]}, {references}))"
    said = set()
    for seed in "12345":
        apart = {**os.environ, "PYTHONHASHSEED": seed}
        said.add(subprocess.run([sys.executable, "-c", code], env=apart, capture_output=True, check=True).stdout)
    assert len(said) == 1
