"""Qwen-VL-Chat: ChatML in which every picture has a number, "Picture 1: " (official `finetune.py`
and tokenizer)."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_internvl.data.templates.base import IMAGE, ChatTemplate, Message, Segment
from lightning_internvl.data.templates.chatml import CHATML

_TURN_MARK = re.compile(r"(<\|im_start\|>|<\|im_end\|>\n)")


@dataclass(frozen=True)
class QwenTemplate(ChatTemplate):
    """Pictures are numbered through the conversation, and each ends its line.

    With `learn_marks` the model also learns where turns of all roles begin and end, as in the
    released fine-tuning script; else answers and their end markers only.
    """

    learn_marks: bool = False

    def rounds(self, conversation: Sequence[Message], eos_token: str = "</s>") -> list[list[Segment]]:
        """Segments of each user-assistant pair; see `ChatTemplate.rounds`."""
        rounds = super().rounds(_number_pictures(map(self.written, conversation)), eos_token)
        return [self._with_marks(segments) for segments in rounds] if self.learn_marks else rounds

    def _with_marks(self, segments: Sequence[Segment]) -> list[Segment]:
        """Marks of turns apart from what they enclose, so that they can be learnt; the line break
        after an answer is one."""
        found: list[Segment] = []
        for text, is_answer in segments:
            pieces = [text] if is_answer else [piece for piece in _TURN_MARK.split(text) if piece]
            for piece in pieces:
                learnt = is_answer or _TURN_MARK.fullmatch(piece) or piece == self.after_answer
                found.append(Segment(piece, bool(learnt)))
        return found


def _number_pictures(conversation: Iterable[Message]) -> list[Message]:
    numbers = itertools.count(1)

    def shown(message: Message) -> Message:
        if message["role"] != "user":
            return message
        content = re.sub(rf"{IMAGE}\n?", lambda match: f"Picture {next(numbers)}: {IMAGE}\n", message["content"])
        return {"role": message["role"], "content": content}

    return [shown(message) for message in conversation]


_ANSWERS = QwenTemplate(
    name="qwen",
    system="You are a helpful assistant.",
    system_format=CHATML.system_format,
    user=CHATML.user,
    assistant=CHATML.assistant,
    answer_end=CHATML.answer_end,
    after_answer=CHATML.after_answer,
    begins_with_bos=False,
)
_MARKS = dataclasses.replace(_ANSWERS, name="qwen_marks", learn_marks=True)

TEMPLATES = (_ANSWERS, _MARKS)
