"""Records of a question and two answers, one preferred to the other, as InternVL's MMPR (question,
chosen, rejected), trl (prompt, chosen, rejected: texts or messages, with the prompt apart or within
both) and LLaMA-Factory (conversations or instruction, chosen, rejected) write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.record_fields import is_empty

CHOSEN, REJECTED = "chosen", "rejected"
MESSAGES = ("conversations", "conversation", "messages", "prompt")  # a list of messages; a prompt may be a text
QUESTIONS = ("prompt", "question", "query", "instruction")
MORE = "input"  # what follows an instruction on a line of its own


def is_preference(record: Mapping[str, Any]) -> bool:
    """Whether a record tells a better and a worse answer, or half of that."""
    return any(not is_empty(record.get(name)) for name in (CHOSEN, REJECTED))


def with_each_answer(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record of preference as two of a conversation, which ends with the chosen and with the
    rejected answer. Raises BadSample for a missing answer and where nothing is asked."""
    for name in (CHOSEN, REJECTED):
        if is_empty(record.get(name)):
            other = REJECTED if name == CHOSEN else CHOSEN
            raise BadSample(f"it has {other!r} and no {name!r}; give both answers", f"no {name} answer")
    used, asked = _asked(record)
    rest = {name: value for name, value in record.items() if name not in (*used, CHOSEN, REJECTED)}
    chosen, rejected = ({**rest, "messages": _conversation(asked, record[name], name)} for name in (CHOSEN, REJECTED))
    return chosen, rejected


def _asked(record: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """The keys that hold what is asked, and it as messages; none where the answers hold it."""
    for name in MESSAGES:
        if isinstance(record.get(name), list) and not is_empty(record[name]):
            return [name], list(record[name])
    for name in QUESTIONS:
        if not is_empty(record.get(name)):
            more = name == "instruction" and not is_empty(record.get(MORE))
            text = f"{record[name]}\n{record[MORE]}" if more else record[name]
            return [name, *([MORE] if more else [])], [{"role": "user", "content": text}]
    return [], []


def _conversation(asked: list[Any], answer: Any, name: str) -> list[Any]:
    """The messages up to an answer: a text, a message, or messages, which may repeat what is asked."""
    answers = answer if isinstance(answer, list) else [answer]
    answers = [{"role": "assistant", "content": one} if isinstance(one, str) else one for one in answers]
    roles = [one.get("role", one.get("from")) if isinstance(one, Mapping) else None for one in answers]
    if any(role in ("user", "human") for role in roles):
        return answers
    if not asked:
        raise BadSample(f"nothing is asked: give one of {', '.join((*MESSAGES, *QUESTIONS[1:]))}, or questions in {name!r}")
    return [*asked, *answers]
