"""Answers of a model to the questions of a batch as rows to learn from, and as lines of a file.

Rows come answer by answer: first one to each question, then the second to each, as `copies` of a batch
have them. Letters: R rows, Q questions, G answers to each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.collate.base import pad_rows
from lightning_internvl.data.collate.questions import Question
from lightning_internvl.files import append_text, json_text, whole_lines, write_text

NAME = "rollouts"


def prompt_rows(questions: Sequence[Question], copies: int, pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (R, L) of all prompts, padded on the left."""
    ids, mask = pad_rows([one.prompt[::-1] for one in questions], pad)
    return {"input_ids": ids.flip(1).repeat(copies, 1), "attention_mask": mask.flip(1).repeat(copies, 1)}


def answer_rows(questions: Sequence[Question], answers: Sequence[Sequence[int]], pad: int, *, shifts: bool) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of prompts with their answers, padded on the right;
    labels stand at answers.

    Args:
        answers: ids of the R rows.
        shifts: False for an encoder-decoder, whose labels are rows of their own.
    """
    prompts = [one.prompt for one in questions] * (len(answers) // len(questions))
    pairs = list(zip(prompts, map(list, answers), strict=True))
    ids, mask = pad_rows([prompt + answer if shifts else prompt for prompt, answer in pairs], pad)
    labels, _ = pad_rows([[IGNORE_INDEX] * len(prompt) * shifts + answer for prompt, answer in pairs], IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_question(rows: Sequence[Any], questions: int) -> list[list[Any]]:
    """What stands in R rows, for each question its G."""
    return [list(rows[place::questions]) for place in range(questions)]


class RolloutLog:
    """Every answer, one line a question, in `rollouts.jsonl`, of further processes in
    `rollouts.SHARE.jsonl`.

    Args:
        folder: of the stage.
        share: which share of the samples this process reads.
    """

    def __init__(self, folder: Path, share: int) -> None:
        self.folder, self.path = folder, folder / (f"{NAME}.{share}.jsonl" if share else f"{NAME}.jsonl")

    def cut(self, step: int) -> None:
        """Drop the lines of this step and later ones, of all processes, so that a stage that is
        resumed writes none twice."""
        for path in sorted(self.folder.glob(f"{NAME}*.jsonl")):
            lines = whole_lines(path)
            kept = [line for line in lines if json.loads(line)["step"] < step]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, questions: Sequence[Question], answers: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Enter what was answered.

        Args:
            answers: what is known of the G answers to each of the Q questions, by name.
        """
        rows = (
            {
                **{"step": step, "key": one.key, "prompt": one.conversation[-1]["content"], "truth": one.truth},
                **{name: values[place] for name, values in answers.items()},
            }
            for place, one in enumerate(questions)
        )
        append_text(self.path, "".join(json_text(row) + "\n" for row in rows))
