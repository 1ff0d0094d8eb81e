"""What a model makes of the part of the user's data that is held out (`data.validation`): its loss,
and answers to its questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.files.datasets import FileDataset
from lightning_internvl.data.module import StageData
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size, gather
from lightning_internvl.evaluation.metrics.token_f1 import token_f1
from lightning_internvl.inference.collators import View
from lightning_internvl.inference.journal import Journal, thumbnail
from lightning_internvl.inference.predictor import Metrics, Precision, Predictor
from lightning_internvl.inference.relevance import of_answer
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext

SHORT = 3  # words of an answer that is compared word for word
LIKE = 0.5  # token F1 from which a longer answer counts as right
STILL = 0.9  # of the first loss, above which little was learnt
LEAST_TOKENS, MOST_TOKENS = 16, 64  # of an answer


@dataclass
class Asked:
    """A question of the held-out data.

    Attributes:
        sample: as `ChatCollator.prompts` takes it; its conversation ends with the question.
        answer: of the model.
    """

    sample: dict[str, Any]
    question: str
    truth: str
    answer: str = ""

    @property
    def picture(self) -> np.ndarray | None:
        """The last one shown before the question, (H, W, 3) uint8; None of a question about
        text."""
        return self.sample["images"][-1] if self.sample["images"] else None

    @property
    def is_short(self) -> bool:
        """Whether the answer is compared word for word."""
        return len(self.truth.split()) <= SHORT

    @property
    def right(self) -> bool:
        """Whether a short answer is the true one, or a longer one has enough of its words."""
        if self.is_short:
            return self.answer == self.truth
        return token_f1(self.answer, self.truth) >= LIKE


class OwnData:
    """The held-out part of a stage's data.

    Args:
        held_out: its samples.
        view: how the stage sees data.
        reads: what the stage learns from: chats, whose questions are asked, or pairs.

    Attributes:
        unusable: why samples cannot be used, by their place.
    """

    def __init__(self, data: StageData, held_out: FileDataset, view: View, reads: str) -> None:
        self.data, self.held_out, self.view = data, held_out, view
        self.chats = view.chats if reads == "chats" else None
        self.reads_pairs = reads == "pairs"
        self.unusable: dict[int, str] = {}

    @classmethod
    def of(cls, trainer: L.Trainer, context: StageContext) -> OwnData | None:
        """That of a stage which is in training; None where nothing is held out."""
        data: StageData | None = trainer.datamodule  # type: ignore[attr-defined]  # of a connector
        if data is None or data.held_out is None:
            return None
        return cls(data, data.held_out, context.view, context.settings.reads)

    def loss(self, trainer: L.Trainer, stage: Stage, samples: int) -> Metrics:
        """`validation_loss`, by learnt token where there are conversations and else by batch, of at
        most so many samples; all processes take part.

        Raises:
            ValueError: if no sample can be used.
        """
        modes = {module: module.training for module in stage.modules()}
        stage.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(stage.seed)
            found = stage.use(self._loss, trainer, stage, samples)
        for module, training in modes.items():
            module.training = training
        return found

    def _loss(self, trainer: L.Trainer, stage: Stage, samples: int) -> Metrics:
        total = weight = used = 0.0
        precision = trainer.precision_plugin
        for batch, copies in self._batches(trainer, samples):
            batch = trainer.strategy.batch_to_device(precision.convert_input(batch), stage.device)
            with precision.forward_context():
                loss = stage.weighted_sum(stage.losses(batch))
            rows = len(batch["keys"])
            learnt = int((batch["labels"] != IGNORE_INDEX).sum()) if "input_ids" in batch else rows
            counts = gather(torch.tensor([[learnt, rows]], device=loss.device)).sum(dim=0) / copies
            # Each process has its share of the mean over all, times their number.
            total += float(gather(loss.detach().reshape(1)).mean() * counts[0])
            weight, used = weight + float(counts[0]), used + float(counts[1])
        return {"validation_loss": total / weight, "validation_samples": used} if weight else {}

    def _batches(self, trainer: L.Trainer, samples: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Batches of this process, and how many processes have the same. All have equally many,
        because their losses wait for each other; what is left over is read by each of them."""
        usable = list(self._prepared(samples))
        share, shares = data_parallel_rank_and_size(trainer)
        even = len(usable) // shares * shares
        own, left = usable[:even][share::shares], usable[even:]
        if own and left and "row" not in left[0]:
            left = []  # pairs are compared with those of other processes, and would meet themselves
        size = self.data.batch_size
        for part, copies in ((own, 1), (left, shares)):
            for start in range(0, len(part), size):
                yield self.data.collate.stack(part[start : start + size]), copies

    def _prepared(self, samples: int) -> Iterator[dict[str, Any]]:
        places = self.places(samples)
        for place in places:
            try:
                yield self.data.collate.prepare(self.held_out[place])
            except ValueError as error:
                self.unusable[place] = str(error)
        if all(place in self.unusable for place in places):
            raise ValueError(f"no held-out sample can be used: {next(iter(self.unusable.values()))}")

    def places(self, samples: int) -> list[int]:
        """At most so many, spread over all that are held out."""
        length = len(self.held_out)
        places = np.linspace(0, length - 1, min(samples, length))
        return sorted(set(places.round().astype(int).tolist()))

    def ask(self, precision: Precision, count: int) -> list[Asked]:
        """Answers of the model to at most so many questions, the first ones of all samples before
        second ones; by one process, or by all where weights are divided."""
        if self.chats is None or not (asked := self._questions(self.chats, count)):
            return []
        tokens = max(len(self.chats.tokenizer.encode(one.truth)) for one in asked) + 8
        most = min(max(tokens, LEAST_TOKENS), MOST_TOKENS)
        scenes: Any = None  # what it is asked are the user's own data
        predictor = Predictor(self.view.model, scenes, chats=self.chats)
        with predictor.evaluating(precision), torch.random.fork_rng():
            written = predictor.complete([one.sample for one in asked], max_new_tokens=most)
        for one, answer in zip(asked, written, strict=True):
            one.answer = answer
        return asked

    def _questions(self, chats: ChatCollator, count: int) -> list[Asked]:
        by_sample = []
        for place in self.places(count):
            try:
                sample = self.held_out[place]
                turns = [] if "videos" in sample else list(turns_of(sample))
                if turns:
                    chats.prompts([turns[0].sample])
                by_sample.append(turns)
            except ValueError as error:
                self.unusable[place] = str(error)
        firsts_first = chain.from_iterable(zip_longest(*by_sample))
        return list(islice((one for one in firsts_first if one), count))


def answer_relevance(view: View, precision: Precision, asked: Sequence[Asked]) -> dict[str, Any]:
    """What in its picture the true answer to each question hangs on, as the report shows it (see
    `lightning_internvl.inference.relevance`)."""
    scenes: Any = None  # the questions are of the user's own data
    predictor = Predictor(view.model, scenes, chats=view.chats)
    with predictor.evaluating(precision):
        return {"relevance": {"of": "answer", "grids": [of_answer(predictor, one.sample, one.truth) for one in asked]}}


def turns_of(sample: dict[str, Any]) -> Iterator[Asked]:
    """The questions of a conversation, each with all that was said and shown before it."""
    turns = sample["conversation"]
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant" and place:
            shown = sum(one["content"].count(IMAGE) for one in turns[:place])
            asked = {**sample, "images": sample["images"][:shown], "conversation": turns[:place]}
            question = turns[place - 1]["content"].replace(IMAGE, "").strip()
            yield Asked(asked, question, turn["content"].strip())


def answer_scores(asked: Sequence[Asked]) -> Metrics:
    """`validation_exact_match` of answers that are short, `validation_token_f1` of all, and how
    many there are."""
    if not asked:
        return {}
    short = [one for one in asked if one.is_short]
    f1 = sum(token_f1(one.answer, one.truth) for one in asked) / len(asked)
    found = {"validation_token_f1": f1, "validation_answers": float(len(asked))}
    if short:
        found["validation_exact_match"] = sum(one.right for one in short) / len(short)
    return found


def keep_cases(asked: Sequence[Asked], journal: Journal) -> None:
    """Put right and wrong answers into a journal, where it has room."""
    for one in asked:
        said = {"question": one.question, "answer": one.answer, "truth": one.truth}
        journal.show(one.picture, **said, right=one.right)


def sample_of(asked: Sequence[Asked]) -> dict[str, Any]:
    """Pictures with the answers about them, as the report follows them over the steps."""
    found: dict[str, Any] = {"images": [], "answers": []}
    for one in asked:
        said = {"question": one.question, "truth": one.truth, "answer": one.answer}
        found["images"].append("" if one.picture is None else thumbnail(one.picture))
        found["answers"].append([{**said, "correct": one.right}])
    return found


def failure(asked: Sequence[Asked], loss: float, first_loss: float | None) -> str:
    """Why answers are good for nothing, in a sentence; nothing where they are not.

    Args:
        loss, first_loss: on the held-out data, at the end and before the first step (None: not
            known).
    """
    count = len(asked)
    if 2 * sum(is_repetition(one.answer) for one in asked) >= count:
        return "its answers are empty or repeat the same letters or words"
    if any(one.right for one in asked):
        return ""
    if count > 2 and len({one.answer for one in asked}) == 1 < len({one.truth for one in asked}):
        return f"all {count} questions got the same answer, and none is right"
    if first_loss is not None and loss > STILL * first_loss:
        fell = f"the loss is {loss:.3g} after {first_loss:.3g}"
        return f"no answer is right, and {fell}: it has learnt next to nothing"
    return ""


def is_repetition(text: str) -> bool:
    """Whether a text is empty, one or two letters again and again ("sssss"), or few words often."""
    letters, words = set(text.replace(" ", "")), text.split()
    if len(letters) <= 2:
        return not letters or len(text) > 5
    return len(words) > 5 and 3 * len(set(words)) <= len(words)
