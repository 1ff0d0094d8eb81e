"""What a chat format is: text around the messages, and which of it the model has to learn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

IMAGE, VIDEO = "<image>", "<video>"
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One message; `role`: system, user or assistant; "<image>" in `content`: a picture.

    `parts` are there where pictures and text came apart: marks and texts in order, which
    `ChatTemplate.written` joins as the format does. `content` then joins them as most formats do.
    `learnt` is false for an answer that is read and not learnt.
    """

    role: str
    content: str
    parts: NotRequired[list[str]]
    learnt: NotRequired[bool]


def message_of(role: str, parts: Sequence[str]) -> Message:
    """A message of marks and texts that came apart; without marks it is their text."""
    if not any(part in (IMAGE, VIDEO) for part in parts):
        return {"role": role, "content": "".join(parts)}
    return {"role": role, "content": joined(parts, "\n"), "parts": list(parts)}


def joined(parts: Sequence[str], joint: str) -> str:
    """Marks and texts as one text, with `joint` behind every mark."""
    return "".join(part + joint if part in (IMAGE, VIDEO) else part for part in parts)


def rewritten(conversation: Sequence[Message], marks: str, changed: Callable[[Iterable[str]], list[str]]) -> list[Message]:
    """Messages with other texts and marks, in the order in which they stand.

    Args:
        marks: a pattern with one group, of the marks that stand apart from the texts between them.
        changed: what stands in the place of the pieces of one message.
    """
    messages = []
    for message in conversation:
        new = message.copy()
        if "parts" in message:
            new["parts"] = changed(message["parts"])
            new["content"] = joined(new["parts"], "\n")
        else:
            new["content"] = "".join(changed(re.split(marks, message["content"])))
        messages.append(new)
    return messages


class Segment(NamedTuple):
    """A piece of the text, tokenised on its own; `is_answer` marks what is learnt."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat format. "{}" stands for the message.

    `answer_end` closes an answer and is learnt with it; None means the end token of the tokenizer.
    `earlier_end`, where it is given, closes those that others follow. `after_answer` is not learnt.
    With `bare_system` the format of a system message is written without one too. Without
    `keep_user_text` only the image markers of user messages stay. `image` is written for each
    "<image>" of a user message, which it contains; `image_frame` names the special tokens around
    the visual tokens, None where there are none. With `images_first` the pictures of a message
    stand before `user`, and its text loses the marks and the space beside them. `joint` stands behind
    each picture of a message whose pictures and texts came apart; with `parts_last` the texts of such
    a message follow all of its pictures, a space between them. Both are those of the published template.
    With `pixel_boxes` boxes count pixels of the picture that the encoder sees (`data.collate.pixel_boxes`).
    With `timestamps` each step of a video stands behind its time (`data.collate.timestamps`).
    """

    name: str
    user: str
    assistant: str
    answer_start: str = ""
    answer_end: str | None = None
    earlier_end: str | None = None
    after_answer: str = ""
    system_format: str = "{}"
    system: str = ""
    bare_system: bool = False
    begins_with_bos: bool = True
    keep_user_text: bool = True
    image: str = IMAGE
    image_frame: tuple[str, str] | None = ("<img>", "</img>")
    images_first: bool = False
    joint: str = "\n"
    parts_last: bool = False
    pixel_boxes: bool = False
    timestamps: bool = False

    def with_system(self, system: str) -> ChatTemplate:
        """The same format with another default system message; "" leaves the system turn out."""
        return dataclasses.replace(self, system=system)

    def end(self, eos_token: str) -> str:
        """The text that ends an answer: generation stops there."""
        return eos_token if self.answer_end is None else self.answer_end

    def said(self, text: str, finished: bool = True) -> str:
        """An answer, decoded without special tokens, without the words of `answer_start` (GPT-OSS:
        "final", its channel); nothing while it may still become these words."""
        words = re.sub(r"<\|.*?\|>", "", self.answer_start).strip()
        if words and not finished and words.startswith(text):
            return ""
        return text.removeprefix(words).lstrip() if words else text

    def written(self, message: Message) -> Message:
        """A message with its text as this format joins pictures and texts, without `parts`."""
        parts = message.get("parts")
        if parts is None:
            return message
        if self.parts_last:
            marks = [part for part in parts if part in (IMAGE, VIDEO)]
            parts = [*marks, " ".join(part for part in parts if part not in marks)]
        found: Message = {"role": message["role"], "content": joined(parts, self.joint)}
        return {**found, "learnt": False} if not message.get("learnt", True) else found

    def rounds(self, conversation: Sequence[Message], eos_token: str = "</s>") -> list[list[Segment]]:
        """Segments of each user-assistant pair; the system message belongs to the first one.

        A last user message without an answer leaves the assistant's turn open, for generation.
        Raises ValueError unless users and assistants alternate, starting with a user, after an
        optional system message.
        """
        system, messages = self.system, [self.written(message) for message in conversation]
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        self._check_roles(messages)
        rounds: list[list[Segment]] = []
        for position in range(0, len(messages), 2):
            before = self.system_format.format(system) if position == 0 and (system or self.bare_system) else ""
            asked = messages[position]["content"]
            if not self.keep_user_text:
                asked = IMAGE * asked.count(IMAGE)
            if self.images_first:
                before += self.image * asked.count(IMAGE)
                asked = " ".join(part for part in map(str.strip, asked.split(IMAGE)) if part)
            asked = asked.replace(IMAGE, self.image)
            segments = [Segment(before + self.user.replace("{}", asked) + self.assistant, False)]
            if position + 1 < len(messages):
                last = position + 2 >= len(messages) or self.earlier_end is None
                end = self.end(eos_token) if last else self.earlier_end or ""
                answer = self.answer_start + messages[position + 1]["content"] + end
                learnt = messages[position + 1].get("learnt", True)
                segments += [Segment(answer, learnt), Segment(self.after_answer, False)]
            rounds.append([segment for segment in segments if segment.text])
        return rounds

    def segments(self, conversation: Sequence[Message], eos_token: str = "</s>") -> list[Segment]:
        """All segments of a conversation, in order; see `rounds`."""
        return [segment for one in self.rounds(conversation, eos_token) for segment in one]

    def _check_roles(self, messages: Sequence[Message]) -> None:
        if not messages:
            raise ValueError("the conversation is empty")
        for position, message in enumerate(messages):
            wanted = ROLES[1 + position % 2]
            if message["role"] != wanted:
                raise ValueError(
                    f"message {position} has role {message['role']!r}, expected {wanted!r}: a "
                    "conversation is an optional system message, then user and assistant in turn"
                )
