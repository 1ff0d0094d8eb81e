"""What all tasks share that ask a model about pictures and judge its text."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.progress import track

from lightning_internvl.console import console
from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.evaluation.shown_pictures import Picture, digest_of_picture, look_at
from lightning_internvl.inference.journal import with_picture
from lightning_internvl.inference.predictor import Metrics, Predictor, as_sample
from lightning_internvl.messages import first_of
from lightning_internvl.report.metrics_table import ASKED, SCORED, TOTAL

BUILT_IN = 250  # scenes of a task without a path
COMMON = 10  # true answers, the commonest, that stand for a model which sees nothing


@dataclass(frozen=True)
class Case:
    """One question about a picture or several.

    Attributes:
        key: names it among all of its task; no other has the same.
        picture: a file, one that is kept in a table, or what draws it.
        question: as the set has it, without the prompt around it.
        truth: what the answer is judged by; None where the set has no true answer.
        part: of the set, where it has parts.
        others: further pictures, in the order in which they are shown.
        groups: further parts of the set that it belongs to, each with a score of its own.
    """

    key: str
    picture: Picture
    question: str
    truth: Any
    part: str = ""
    others: tuple[Picture, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All that are shown."""
        return (self.picture, *self.others)

    def look(self) -> np.ndarray:
        """The first picture, (H, W, 3) uint8; raises ValueError for a file that is no picture."""
        return look_at(self.picture)


class AnswerTask(ABC):
    """A task whose score is a function of answers.

    Args:
        path: the file or folder of a public set; None: the built-in scenes.
        images: the folder of its pictures; None: that of `path`.
        prompt: what is asked; {question} stands for the question of the set. None: `PROMPT` with a
            path, else the question alone.
        max_new_tokens: the longest answer.
        beams: 1 takes the likeliest token each time.
        samples: the first so many, None for all.
        max_missing: share of samples that may lack a picture or a true answer.
        version: raised when a change of the task changes scores.
    """

    needs: ClassVar[str] = "chats"
    PROMPT: ClassVar[str] = "{question}"
    SCENES_PROMPT: ClassVar[str] = "{question}"
    RIGHT: ClassVar[float] = 0.5  # the grade from which the page shows an answer as a right one
    SHOWN: ClassVar[str] = "image"  # what is shown, in messages
    MEASURE: ClassVar[str] = "accuracy"  # what the mean of the grades is called

    def __init__(
        self,
        *,
        path: str | None = None,
        images: str | None = None,
        prompt: str | None = None,
        max_new_tokens: int = 16,
        beams: int = 1,
        samples: int | None = None,
        max_missing: float = 0.01,
        version: int = 1,
    ) -> None:
        self.path = existing_path(path, "path")
        folder = self.path if self.path is None or self.path.is_dir() else self.path.parent
        # the built-in scenes have no folder and ask for none
        self.images = existing_path(images, "images") or folder or Path()
        self.prompt = prompt or (self.PROMPT if path else self.SCENES_PROMPT)
        if "{question}" not in self.prompt and "{question}" in self.PROMPT:
            raise ValueError(f"{prompt=} has no place for the question; write {{question}} there")
        self.max_new_tokens, self.beams = max_new_tokens, beams
        self.samples, self.max_missing, self.version = samples, max_missing, version

    @abstractmethod
    def cases(self, predictor: Predictor) -> list[Case]:
        """All questions, in the order of the set."""

    @abstractmethod
    def judge(self, case: Case, answer: str) -> float:
        """How right an answer is, from 0 to 1."""

    def grades(self, cases: Sequence[Case], answers: Sequence[str]) -> list[float]:
        """How right each of all answers is, as predictions.jsonl keeps it."""
        return [self.judge(case, answer) for case, answer in zip(cases, answers, strict=True)]

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        """The numbers over all questions that were answered."""
        return beside_chance(self.MEASURE, cases, self.grades(cases, answers), self.blind_grades(cases))

    def blind_grades(self, cases: Sequence[Case]) -> list[Sequence[float]]:
        """Grades of models that see nothing, one row each: those that give one answer to every
        question."""
        return [self.grades(cases, [text] * len(cases)) for text in ("", *self.constants(cases))]

    def constants(self, cases: Sequence[Case]) -> Sequence[str]:
        """Answers that a model which sees nothing gives to every question, the empty one aside: the
        commonest true ones."""
        said = Counter(text for case in cases for text in set(self.true_answers(case)))
        return [text for text, _ in said.most_common(COMMON)]

    def true_answers(self, case: Case) -> Sequence[str]:
        """What a model that is right answers, each of several where the set has them."""
        return [case.truth] if isinstance(case.truth, str) else list(case.truth)

    def truth_text(self, case: Case) -> str:
        """The truth as the page shows it."""
        return str(case.truth)

    def __call__(self, predictor: Predictor) -> Metrics:
        predictor.journal.notes["prompt"] = self.prompt
        cases = self.cases(predictor)
        check_keys(cases)
        self._digests: dict[Picture, str | None] = {}
        asked = cases[: self.samples]
        usable = self._usable(asked, predictor)
        answers = dict(self._answers(usable, len(asked), predictor))
        scored = [case for case in usable if case.key in answers]
        if not scored:
            missing = predictor.journal.missing.values()
            raise ValueError(f"none of {len(asked)} samples can be scored: {first_of(missing, 1)}")
        found = self.score(scored, [answers[case.key] for case in scored], predictor)
        self._keep_predictions(scored, answers, predictor)
        counts = {SCORED: found.get(SCORED, len(scored)), ASKED: len(asked), TOTAL: len(cases)}
        return {**found, **counts}

    def _usable(self, cases: Sequence[Case], predictor: Predictor) -> list[Case]:
        """Those with a truth and a picture file; raises ValueError where too many lack one."""
        usable = []
        for case in cases:
            if case.truth is None:
                predictor.journal.add_missing(case.key, "there is no true answer")
            elif gone := [path for path in case.pictures if isinstance(path, Path) and not path.exists()]:
                predictor.journal.add_missing(case.key, f"{self.SHOWN} {gone[0]} does not exist")
            else:
                usable.append(case)
        self._check_missing(len(cases), predictor)
        return usable

    def _check_missing(self, asked: int, predictor: Predictor) -> None:
        missing = predictor.journal.missing
        if len(missing) > self.max_missing * asked:
            raise ValueError(
                f"{len(missing)} of {asked} samples cannot be scored, more than max_missing={self.max_missing} allows: "
                + "; ".join(f"{key}: {reason}" for key, reason in list(missing.items())[:3])
            )

    def _answers(self, cases: Sequence[Case], asked: int, predictor: Predictor) -> Iterator[tuple[str, str]]:
        """Key and answer of every question, those of an earlier attempt first. `asked` counts those
        that cannot be used too."""
        journal, waiting = predictor.journal, []
        for case in cases:
            known = self._earlier_answer(case, predictor)
            if known is None:
                waiting.append(case)
            else:
                yield case.key, known
        if other := sum(journal.was_asked(case.key, self._prompt_for(case)) for case in waiting):
            reason = f"their pictures have changed, or {journal.path} does not say which were shown"
            console.print(f"{other} questions are asked again: {reason}", soft_wrap=True, markup=False)
        size = self._questions_at_a_time(predictor)
        parts = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        hidden = journal.path is None or not console.is_terminal
        for part in track(parts, "asking", console=console, transient=True, disable=hidden):
            rows = list(self._ask_model(part, predictor))
            journal.add(rows, {case.key: self._picture_digest(case) for case in part})
            yield from ((key, answer) for key, _, answer in rows)
            self._check_missing(asked, predictor)

    def _earlier_answer(self, case: Case, predictor: Predictor) -> str | None:
        """The answer of an earlier attempt to the same question about the same picture."""
        question = self._prompt_for(case)
        if not predictor.journal.was_asked(case.key, question):
            return None  # its picture need not be read to know that
        return predictor.journal.answer(case.key, question, self._picture_digest(case))

    def _questions_at_a_time(self, predictor: Predictor) -> int:
        tiles = predictor.chats.processor.max_tiles if predictor.chats else 1
        return max(1, predictor.batch_size // tiles)

    def _prompt_for(self, case: Case) -> str:
        return self.prompt.replace("{question}", case.question)

    def _picture_digest(self, case: Case) -> str | None:
        """Digests of what the files of its pictures hold; None where all are drawn."""
        for picture in case.pictures:
            if picture not in self._digests:
                self._digests[picture] = digest_of_picture(picture)
        found = [self._digests[picture] for picture in case.pictures]
        return None if found == [None] * len(found) else "+".join(digest or "" for digest in found)

    def look(self, case: Case) -> Any:
        """What the model is shown of a question, pictures (H, W, 3) uint8; raises ValueError for
        what cannot be read."""
        return [look_at(picture) for picture in case.pictures]

    def cover(self, case: Case) -> np.ndarray:
        """A picture (H, W, 3) uint8 that stands for a question on the page."""
        return case.look()

    def _ask_model(self, cases: Sequence[Case], predictor: Predictor) -> Iterator[tuple[str, str, str]]:
        """Key, question and answer; samples that cannot be asked are noted."""
        seen: list[tuple[Case, Any]] = []
        for case in cases:
            try:
                seen.append((case, self.look(case)))
            except ValueError as error:
                predictor.journal.add_missing(case.key, error)
        for (case, _), answer in zip(*self._ask_each(seen, predictor), strict=True):
            yield case.key, self._prompt_for(case), answer

    def _ask_each(self, seen: list[tuple[Case, Any]], predictor: Predictor) -> tuple[list[tuple[Case, Any]], list[str]]:
        """The questions that the model can read, and its answers. One that is too long must not
        cost the others theirs."""
        if not seen:
            return [], []
        try:
            return seen, self.ask(seen, predictor)
        except ValueError as error:
            if len(seen) == 1:
                predictor.journal.add_missing(seen[0][0].key, error)
                return [], []
        alone = [self._ask_each([one], predictor) for one in seen]
        cases, texts = zip(*alone, strict=True)
        return list(itertools.chain(*cases)), list(itertools.chain(*texts))

    def ask(self, seen: Sequence[tuple[Case, Any]], predictor: Predictor) -> list[str]:
        """Answers of the model to questions and what is shown for each. Where a question does not
        say where its pictures stand, they come first."""
        questions = [self._prompt_for(case) for case, _ in seen]
        if all(len(shown) == 1 for _, shown in seen) and not any(IMAGE in question for question in questions):
            return self.write([shown[0] for _, shown in seen], questions, predictor)
        asked = zip(seen, questions, strict=True)
        samples = [as_sample(shown, question, case.key) for (case, shown), question in asked]
        return predictor.complete(samples, self.max_new_tokens, **self.search_options())

    def write(self, pictures: Pictures, questions: Sequence[str], predictor: Predictor) -> list[str]:
        """Answers of the model to questions about one picture each."""
        return predictor.answer(pictures, questions, self.max_new_tokens, **self.search_options())

    def search_options(self) -> dict[str, int]:
        """Options of `generate` beside the length."""
        return {"num_beams": self.beams} if self.beams > 1 else {}

    def _keep_predictions(self, cases: Sequence[Case], answers: dict[str, str], predictor: Predictor) -> None:
        """Every answer with its judgement, and a few of all the set with their pictures."""
        written = [answers[case.key] for case in cases]
        rows = list(zip(cases, written, self.grades(cases, written), strict=True))
        predictor.journal.finish(
            {
                **{"key": case.key, "part": case.part, "question": self._prompt_for(case)},
                **{"answer": answer, "truth": self.truth_text(case), "score": score},
                **with_picture(self._picture_digest(case)),
            }
            for case, answer, score in rows
        )
        for right in (True, False):
            kind = [row for row in rows if (row[2] >= self.RIGHT) == right]
            step = max(1, len(kind) // max(1, predictor.journal.cases))
            for case, answer, _ in kind[::step]:
                if predictor.journal.has_room(right):
                    texts = {"question": self._prompt_for(case), "truth": self.truth_text(case)}
                    predictor.journal.show(self.cover(case), **texts, answer=answer, right=right)


def check_keys(cases: Sequence[Case]) -> None:
    """Raise ValueError where two samples share a key, by which answers are kept."""
    places: dict[str, int] = {}
    for place, case in enumerate(cases):
        first = places.setdefault(case.key, place)
        if first != place:
            two = (f"sample {at + 1} ({_description(cases[at])})" for at in (first, place))
            fault = f"two samples have the key {case.key!r}: {' and '.join(two)}"
            raise ValueError(f"{fault}; give each a key of its own")


def _description(case: Case) -> str:
    return f"{case.picture if isinstance(case.picture, Path) else 'a scene'}, {case.question[:80]!r}"


def existing_path(path: str | None, setting: str) -> Path | None:
    """A path, if one is given; raises ValueError if nothing is there."""
    if path is not None and not Path(path).exists():
        raise ValueError(f"{setting}={path}: there is no such file or folder")
    return None if path is None else Path(path)


def beside_chance(name: str, cases: Sequence[Case], values: Sequence[float], blind: Sequence[Sequence[float]]) -> Metrics:
    """Means over all samples and by part of the set where it has several, each beside the best that
    models get which see nothing.

    Args:
        blind: the values of such models, a row each.
    """
    found: Metrics = {}
    for end, places in places_by_part(cases).items():
        found[name + end] = sum(values[place] for place in places) / len(places)
        found[f"{name}{end}_chance"] = max(sum(row[place] for place in places) / len(places) for row in blind)
    return found


def places_by_part(cases: Sequence[Case]) -> dict[str, list[int]]:
    """Places of all samples, under "", and of those of each part and group, under "_NAME", where
    there are several."""
    found: dict[str, list[int]] = {"": list(range(len(cases)))}
    several = len({case.part for case in cases}) > 1
    for place, case in enumerate(cases):
        for name in dict.fromkeys(((case.part,) if several else ()) + case.groups):
            found.setdefault(f"_{name}", []).append(place)
    return found
