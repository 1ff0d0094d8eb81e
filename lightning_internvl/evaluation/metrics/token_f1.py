"""How many words an answer shares with the true one (Rajpurkar et al. 2016, SQuAD)."""

from __future__ import annotations

from collections import Counter

from lightning_internvl.evaluation.metrics.vqa_accuracy import common_form


def token_f1(answer: str, truth: str) -> float:
    """The harmonic mean of the shares of words that two texts have in common, from 0 to 1; case,
    marks and articles do not count."""
    words, true = ((common_form(text) or text.strip()).split() for text in (answer, truth))
    if not words or not true:
        return float(words == true)
    common = (Counter(words) & Counter(true)).total()
    return 2 * common / (len(words) + len(true))
