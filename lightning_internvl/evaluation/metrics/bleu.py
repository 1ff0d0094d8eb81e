"""BLEU of a set of captions as the COCO evaluation computes it (Papineni et al., 2002; the closest
reference's length counts)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

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
    shared, written = [0] * MAX_N, [0] * MAX_N
    length = closest = 0
    for candidate, own in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(reference) - len(candidate)), len(reference)) for reference in own)[1]
        for n in range(1, MAX_N + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in own:
                most |= _ngrams(reference, n)  # the largest count of each
            shared[n - 1] += (_ngrams(candidate, n) & most).total()
            written[n - 1] += max(0, len(candidate) - n + 1)
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n, (right, total) in enumerate(zip(shared, written, strict=True), start=1):
        product *= (right + TINY) / (total + SMALL)
        scores.append(brevity * product ** (1 / n))
    return scores


def _ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
