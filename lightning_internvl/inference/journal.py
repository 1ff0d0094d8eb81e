"""What a task leaves behind beside its numbers: every answer as it comes, samples without a score,
and some cases to look at."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_internvl.files import append_text, json_text, write_text
from lightning_internvl.messages import without_secrets

SIDE = 256  # of a picture that is kept to be looked at
NAMED = 1000  # samples that could not be used and are named in the record; all are counted


class Journal:
    """The notes of one task. Answers are appended to a file one by one, so that an evaluation that
    was stopped goes on. An answer is known by its sample, the question as it was asked, and the
    content of the picture file that was shown. A name with a secret, as an address may be, is kept
    without it, so that its sample is asked again.

    Args:
        path: the JSON-lines file of answers; None keeps them in memory alone.
        cases: how many right and how many wrong cases are kept with their pictures.
    """

    def __init__(self, path: Path | None = None, cases: int = 0) -> None:
        self.path, self.cases = path, cases
        self.missing: dict[str, str] = {}
        self.notes: dict[str, Any] = {}  # what else tells how a score was found
        self.shown: list[dict[str, Any]] = []
        self._known: dict[tuple[str, str], tuple[str, str | None]] = {}
        for row in _rows(path) if path else ():
            self._known[row["key"], row["question"]] = row["answer"], row.get("picture")

    def was_asked(self, key: str, question: str) -> bool:
        """Whether a question about a sample was answered, whatever picture was shown."""
        return (key, question) in self._known

    def answer(self, key: str, question: str, picture: str | None = None) -> str | None:
        """What was answered to a question about a sample, now or before an interruption.

        Args:
            picture: digest of the file that is shown; an answer about another one is not given.
                None: of what is drawn.
        """
        answer, shown = self._known.get((key, question), (None, None))
        return answer if shown == picture else None

    def add(self, rows: Iterable[tuple[str, str, str]], pictures: Mapping[str, str | None] | None = None) -> None:
        """Keep (key, question, answer), with the digests of picture files by key."""
        rows, pictures = list(rows), pictures or {}
        self._known |= {(key, question): (answer, pictures.get(key)) for key, question, answer in rows}
        if self.path:
            told = ({"key": k, "question": q, "answer": a, **with_picture(pictures.get(k))} for k, q, a in rows)
            append_text(self.path, "".join(map(_line, told)))

    def finish(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace the file by whole rows: "key", "question", "answer" and the judgement."""
        if self.path:
            write_text(self.path, "".join(map(_line, rows)))

    def add_missing(self, key: str, reason: object) -> None:
        """Note a sample that was asked for and cannot be scored."""
        self.missing[key] = str(reason)

    def has_room(self, right: bool) -> bool:
        """Whether another case of this kind is to be shown."""
        return sum(case["right"] == right for case in self.shown) < self.cases

    def show(self, picture: np.ndarray | None, *, question: str, answer: str, truth: str, right: bool) -> None:
        """Keep a case, (H, W, 3) uint8 or None, if there is room for its kind."""
        if self.has_room(right):
            said = {"question": question, "answer": answer, "truth": truth}
            png = "" if picture is None else thumbnail(picture)
            self.shown.append({"png": png, **said, "right": bool(right)})

    def record(self) -> dict[str, Any]:
        """The notes, and the samples that could not be used, for the record of the task."""
        named = {without_secrets(key): without_secrets(reason) for key, reason in list(self.missing.items())[:NAMED]}
        return {**self.notes, "missing": len(self.missing), "missing_named": named}


def with_picture(digest: str | None) -> dict[str, str]:
    """What a row says of its picture: the digest of its file, nothing of a drawn one."""
    return {} if digest is None else {"picture": digest}


def thumbnail(picture: np.ndarray, side: int = SIDE) -> str:
    """(H, W, 3) uint8 -> base64 PNG, at most `side` pixels wide and high."""
    image, stream = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _line(row: dict[str, Any]) -> str:
    return json_text(row | {"key": without_secrets(row["key"])}) + "\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; half a line, left by a process that was killed, is cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    # Not splitlines: answers may hold other marks of a line's end.
    return [json.loads(line) for line in whole.split("\n")[:-1]]
