"""Labels of rows of ids by the marks that stand in them, as InternLM-XComposer 1 and 2 find them (official `mask_human_targets`).

For rows that are ids already, and to compare with the original. Conversations get their labels in `encode.py`, where text and
answers are tokenised apart.
"""

from __future__ import annotations

from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX

ROLE_TOKENS = 5  # of the assistant's role, between the end of a question and its answer


def labels_by_turns(ids_BL: Tensor, *, turn_end: int = 92542, eos: int = 2) -> Tensor:
    """(B, L) -> (B, L), for a format in which one mark ends questions and answers in turn (XComposer2).

    Questions with their mark and the role after it are not learnt; answers with their mark are. After the first `eos`, which is
    learnt, comes padding. Of a row that was cut off after an answer, what follows the token behind its mark is not learnt.
    """
    labels_BL = ids_BL.clone()
    for ids, labels in zip(ids_BL.tolist(), labels_BL, strict=True):
        marks, answered = 0, 0
        length = _length(ids, eos)
        labels[length:] = IGNORE_INDEX
        for place in (i for i in range(length) if ids[i] == turn_end):
            if marks % 2 == 0:
                labels[answered : place + 1 + ROLE_TOKENS] = IGNORE_INDEX
            else:
                answered = place + 1
            marks += 1
        if ids[length - 1] != eos and marks % 2 == 0:
            labels[answered + 1 :] = IGNORE_INDEX
    return labels_BL


def labels_by_ends(ids_BL: Tensor, *, question_end: int = 103027, answer_end: int = 103028, eos: int = 2) -> Tensor:
    """(B, L) -> (B, L), for a format in which questions and answers end with marks of their own (XComposer 1).

    As `labels_by_turns`, but of a row that was cut off after an answer, all that follows its mark is not learnt.
    """
    labels_BL = ids_BL.clone()
    for ids, labels in zip(ids_BL.tolist(), labels_BL, strict=True):
        start, question, answer = 0, 0, 0  # of what a question's end hides; the last mark of either kind
        length = _length(ids, eos)
        labels[length:] = IGNORE_INDEX
        for place in range(length):
            if ids[place] == question_end:
                labels[start : place + 1 + ROLE_TOKENS] = IGNORE_INDEX
                start, question = place + 1 + ROLE_TOKENS, place
            elif ids[place] == answer_end:
                start, answer = place + 1, place
        if ids[length - 1] != eos and answer > question:
            labels[answer + 1 :] = IGNORE_INDEX
    return labels_BL


def _length(ids: list[int], eos: int) -> int:
    """Tokens up to the first `eos`, with it."""
    return ids.index(eos) + 1 if eos in ids else len(ids)
