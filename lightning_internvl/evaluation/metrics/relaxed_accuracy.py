"""Relaxed accuracy of questions about charts (Masry et al., 2022, arXiv:2203.10244, section 5.1)."""

from __future__ import annotations

TOLERANCE = 0.05


def is_nearly(answer: str, truth: str) -> bool:
    """Whether a number is within 5% of the true one, "%" being a hundredth, or a text the same but
    for its case (google-research/pix2struct, metrics.py, `relaxed_correctness`). A truth of 0 is
    compared as a text."""
    said, true = _number(answer), _number(truth)
    if said is None or not true:
        return answer.lower() == truth.lower()
    return abs(said - true) / abs(true) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
