"""CIDEr-D, the caption score of the COCO evaluation (Vedantam et al., 2015, arXiv:1411.5726,
section 5 and appendix).

A caption becomes one vector per n-gram length (1 to 4), of counts weighted by how rare each n-gram
is among the references. The score is the mean cosine between candidate and reference, with three
guards against gaming it: counts above those of the reference are clipped, a difference in length
costs a Gaussian factor, and no stemming merges words.
"""

from __future__ import annotations

import functools
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_N = 4
LENGTH_SIGMA = 6.0
SCALE = 10.0


def tokenize(text: str) -> list[str]:
    """Words of `text`: lower case, punctuation removed (not replaced by a blank: "it's" is "its"),
    split on blanks.

    The COCO tools run the Penn Treebank tokenizer of Stanford CoreNLP (Java) instead, so scores of
    captions with punctuation inside words may differ from theirs; on text that is already tokenised
    they are equal.
    """
    return "".join(letter for letter in text.lower() if not _is_punctuation(letter)).split()


@functools.cache
def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")


def _ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


@dataclass(frozen=True)
class _Vector:
    weights: list[dict[tuple[str, ...], float]]  # one sparse tf-idf vector per n-gram length
    norms: list[float]
    length: int


def _vector(ngrams: Counter[tuple[str, ...]], frequency: Counter[tuple[str, ...]], log_documents: float) -> _Vector:
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
    for ngram, count in ngrams.items():
        weights[len(ngram) - 1][ngram] = count * (log_documents - math.log(max(1, frequency[ngram])))
    norms = [math.sqrt(sum(weight**2 for weight in of_n.values())) for of_n in weights]
    # The COCO evaluation measures length in bigrams, which matters for captions of no or one word.
    length = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
    return _Vector(weights, norms, length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Clipped cosine averaged over the n-gram lengths, times the length penalty; from 0 to 1."""
    total = 0.0
    vectors = candidate.weights, reference.weights, candidate.norms, reference.norms
    for mine, theirs, norm_mine, norm_theirs in zip(*vectors, strict=True):
        if norm_mine and norm_theirs:
            shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs)
            total += shared / (norm_mine * norm_theirs)
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * LENGTH_SIGMA**2))
    return penalty * total / MAX_N


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], words: Callable[[str], list[str]] = tokenize
) -> tuple[float, list[float]]:
    """CIDEr-D of captions: the mean over pictures, and the score of each; from 0 to 10.

    An n-gram's document frequency is the number of pictures with it in at least one reference, so
    the score of one caption depends on the whole set, and a set of one picture (or the same
    references everywhere) scores 0.

    Args:
        candidates: one generated caption per picture.
        references: the true captions of each picture, at least one.
        words: how a caption is split; `str.split` for captions that were prepared as the COCO tools
            do (see `ptb`).

    Raises:
        ValueError: no captions, another number of candidates than of references, or a picture
            without a reference.
    """
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"cider needs one list of references per candidate, got {len(candidates)} candidates "
            f"and {len(references)} lists of references."
        )
    true = _References(references, words)
    scores = [true.score(true.vector(words(candidate)), place) for place, candidate in enumerate(candidates)]
    return sum(scores) / len(scores), scores


def cider_of_constants(
    captions: Sequence[str], references: Sequence[Sequence[str]], words: Callable[[str], list[str]] = tokenize
) -> list[float]:
    """CIDEr-D of models that say the same of every picture, one for each of some captions."""
    true, pictures = _References(references, words), range(len(references))
    vectors = [true.vector(words(caption)) for caption in captions]
    return [sum(true.score(vector, place) for place in pictures) / len(references) for vector in vectors]


class _References:
    """The vectors of the true captions of a set."""

    def __init__(self, references: Sequence[Sequence[str]], words: Callable[[str], list[str]]) -> None:
        without = [index for index, of_picture in enumerate(references) if not of_picture]
        if without:
            raise ValueError(f"cider needs at least one reference per picture; none for the pictures at {without[:10]}.")
        counts = [[_ngrams(words(text)) for text in of_picture] for of_picture in references]
        self.frequency: Counter[tuple[str, ...]] = Counter()
        for of_picture in counts:
            self.frequency.update(set().union(*of_picture))
        self.log_documents = math.log(len(references))
        self.vectors = [[self._vector(ngrams) for ngrams in of_picture] for of_picture in counts]

    def _vector(self, ngrams: Counter[tuple[str, ...]]) -> _Vector:
        return _vector(ngrams, self.frequency, self.log_documents)

    def vector(self, caption: list[str]) -> _Vector:
        """Of the words of a caption."""
        return self._vector(_ngrams(caption))

    def score(self, vector: _Vector, place: int) -> float:
        """Of a caption beside the true ones of a picture."""
        similar = [_similarity(vector, theirs) for theirs in self.vectors[place]]
        return SCALE * sum(similar) / len(similar)
