"""Conversations whose last answer the model gives itself: the prompt is a row of its own, and the last
answer, which is the true one, is what others are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_internvl.data.collate.base import Prepared, Sample
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import TooLong, encode_prompt
from lightning_internvl.data.collate.pixel_boxes import Size
from lightning_internvl.data.templates import Message

QUESTIONS = "questions"  # of a batch: what is asked, a `Question` each
ADVANTAGES = "advantages"  # of a batch with answers: how much better each row's is than others, (R,)


class Question(NamedTuple):
    """What is asked of the model.

    Attributes:
        conversation: up to the question.
        truth: the true answer.
        prompt: ids of all that stands before the answer.
        place: of the sample in the stage's data, from which chance is drawn.
        frame: height and width of the picture in whose pixels the model counts boxes; None where it
            counts in 0..1000.
    """

    key: str
    conversation: list[Message]
    truth: str
    prompt: list[int]
    place: int
    frame: Size | None


class QuestionChats(ChatCollator):
    """What `ChatCollator` gives, of which the last answer alone is learnt, and `questions`.

    Args:
        answers: to each question, as `blank` has them.
        answer_tokens: room for an answer within `max_length`.
        settings: of `ChatCollator`.
    """

    def __init__(self, *given: Any, answers: int, answer_tokens: int, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.copies, self.answer_tokens = answers, answer_tokens

    def prepare(self, sample: Sample) -> Prepared:
        """Tiles, ids and labels of one conversation, and its question. Raises ValueError naming the
        sample, also where an answer has no room."""
        sample = self._with_frames(sample)
        before, last = sample["conversation"][:-1], sample["conversation"][-1:]
        asked: list[Message] = [one.copy() for one in before]
        for message in asked:
            if message["role"] == "assistant":
                message["learnt"] = False
        prepared = super().prepare({**sample, "conversation": [*asked, *last]})
        open_ended, shown = {**sample, "conversation": asked}, (prepared["pictures"], prepared["videos"])
        prompt = self._row({**open_ended, "conversation": self._read(open_ended, *shown)}, *shown, encode_prompt)
        if len(prompt) + self.answer_tokens > self.max_length:
            room = f"{len(prompt)} tokens before an answer of up to {self.answer_tokens} are more than {self.max_length}"
            raise TooLong(
                f"sample {sample['key']}: {room}; raise data.chats_collate.max_text_tokens, or lower module.answer_tokens"
            )
        place = sample.get("draw", (0, 0))[-1]
        frame = self.box_frame(open_ended)
        prepared["question"] = Question(sample["key"], asked, last[0]["content"], prompt, place, frame)
        return prepared

    def check(self, sample: Sample) -> int | None:
        """None: no turn is left out. Raises ValueError as `prepare` does."""
        self.prepare(sample)
        return None

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared conversations."""
        return {**super().stack(prepared), QUESTIONS: [one["question"] for one in prepared]}

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The largest batch that a step can meet, without data: with all answers."""
        batch = super().blank(batch_size, device)
        return {**batch, ADVANTAGES: torch.zeros(len(batch["input_ids"]), device=device)}
