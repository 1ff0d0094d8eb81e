"""BLEU of a set of captions as the COCO evaluation computes it (Papineni et al., 2002; the closest
reference's length counts)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MAX_N = 4
# The COCO tools' guards against zero; they show in scores of captions without common words.
TINY, SMALL = 1e-15, 1e-9

Words = Sequence[str]


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4, from 0 to 1, over all captions together.

    Args:
        candidates: the words of one caption a picture.
        references: the words of the true captions of each picture, at least one.
    """
    counts = [_counts(candidate) for candidate in candidates]
    return _scores(candidates, counts, [_of_picture(own) for own in references])


def bleu_of_constants(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[list[float]]:
    """BLEU-1 to BLEU-4 of models that say the same of every picture, for each of some captions."""
    true = [_of_picture(own) for own in references]
    return [_scores([caption] * len(true), [_counts(caption)] * len(true), true) for caption in captions]


class _True(NamedTuple):
    """Of the captions of a picture the largest count of each n-gram, by n, and their lengths."""

    counts: list[Counter[tuple[str, ...]]]
    lengths: list[int]


def _of_picture(own: Sequence[Words]) -> _True:
    most: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(MAX_N)]
    for reference in own:
        for counts, found in zip(most, _counts(reference), strict=True):
            counts |= found
    return _True(most, [len(reference) for reference in own])


def _scores(candidates: Sequence[Words], counts: Sequence[Sequence[Counter]], references: Sequence[_True]) -> list[float]:
    shared, written = [0] * MAX_N, [0] * MAX_N
    length = closest = 0
    for candidate, own, true in zip(candidates, counts, references, strict=True):
        length += len(candidate)
        closest += min((abs(reference - len(candidate)), reference) for reference in true.lengths)[1]
        for place, (found, most) in enumerate(zip(own, true.counts, strict=True)):
            shared[place] += sum(min(count, most[ngram]) for ngram, count in found.items())
            written[place] += max(0, len(candidate) - place)
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n, (right, total) in enumerate(zip(shared, written, strict=True), start=1):
        product *= (right + TINY) / (total + SMALL)
        scores.append(brevity * product ** (1 / n))
    return scores


def _counts(words: Words) -> list[Counter[tuple[str, ...]]]:
    return [_ngrams(words, n) for n in range(1, MAX_N + 1)]


def _ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
