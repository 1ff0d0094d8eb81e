"""How far two texts are apart, and ANLS, the score of questions about documents."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5  # of similarity, below which an answer gets nothing


def edit_distance(one: str, other: str) -> int:
    """The fewest letters that are put in, left out or exchanged (Levenshtein)."""
    if len(one) < len(other):
        one, other = other, one
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, start=1):
        corner, row[0] = row[0], place
        for column, second in enumerate(other, start=1):
            kept = corner + (letter != second)
            corner = row[column]
            row[column] = min(kept, corner + 1, row[column - 1] + 1)
    return row[-1]


def anls(answer: str, truths: Sequence[str]) -> float:
    """The similarity of an answer to the nearest true one, 1 less their distance by the length of
    the longer; 0 below a half. Case and the number of blanks do not count, but blanks count in the
    length (the RRC's script of DocVQA and InfographicVQA, infographicsvqa_eval.py; Biten et al.,
    2019, section 4).
    """
    distances = []
    for truth in truths:
        longest = max(len(truth.upper()), len(answer.upper()))
        distances.append(edit_distance(_plain(truth), _plain(answer)) / longest if longest else 0.0)
    found = 1 - min(distances)
    return found if found >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())
