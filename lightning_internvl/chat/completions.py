"""Answers to conversations that come with a request, whole or as server-sent events, in the form of OpenAI's API.

Source: https://platform.openai.com/docs/api-reference (chat/object, chat/streaming).
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple

import anyio

from lightning_internvl.chat.limits import in_a_thread
from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.requests import ApiError, ChatRequest, ImagePart, picture_of, without_none
from lightning_internvl.chat.session import CaptionSession, Sampling, Session
from lightning_internvl.chat.settings import ChatSettings

MOST_STOPS = 4
SEEDS = 1000  # between the seeds of the answers to one request


class Piece(NamedTuple):
    """One of the answers, as far as it is written; `finish` is there once it has ended."""

    choice: int
    text: str
    finish: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Completion:
    """The answers to one request.

    Args:
        model: its name, which answers give.
        sampling: what holds where the request says nothing.

    Raises:
        ApiError: for what this model cannot do.
    """

    def __init__(self, asked: ChatRequest, loaded: Loaded, model: str, settings: ChatSettings, sampling: Sampling) -> None:
        if loaded.session is None:
            raise ApiError(400, f"{model} has no decoder to talk to; it embeds: POST /v1/embeddings")
        self.asked, self.begin, self.model, self.settings = asked, loaded.session, model, settings
        self.sampling = self._sampling(sampling)

    def _sampling(self, usual: Sampling) -> Sampling:
        asked, length = self.asked, self.asked.max_completion_tokens or self.asked.max_tokens
        if length and length > (most := self.settings.longest_answer):
            raise ApiError(
                400, f"max_tokens={length} must be at most {most} (max_new_tokens of the server raises it)", "max_tokens"
            )
        if len(asked.stops) > MOST_STOPS:
            raise ApiError(400, f"stop has {len(asked.stops)} words, at most {MOST_STOPS} are followed", "stop")
        given = {"temperature": asked.temperature, "top_p": asked.top_p, "max_new_tokens": length, "seed": asked.seed}
        try:
            sampling = dataclasses.replace(usual, **without_none(given))
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        if asked.seed is not None and sampling.temperature > 0 and (count := self.settings.max_parallel) > 1:
            raise ApiError(400, f"seed cannot be followed: the server writes max_parallel={count} answers at a time", "seed")
        return sampling

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The answers as they are written, one after the other; raises ValueError for a
        conversation that cannot be answered."""
        for choice in range(self.asked.n):
            talk, question = await anyio.to_thread.run_sync(self._conversation)
            drawn = dataclasses.replace(self.sampling, seed=self.sampling.seed + choice * SEEDS)
            text = ""
            async with aclosing(in_a_thread(talk.ask(question, drawn, self.asked.stops))) as texts:
                async for text in texts:
                    yield Piece(choice, text)
            used = talk.usage
            assert used is not None  # the answer has ended
            yield Piece(choice, text, used.finish, used.prompt_tokens, used.answer_tokens)

    def _conversation(self) -> tuple[Session, list[str]]:
        """The conversation before its last message, and that message as a question."""
        talk, messages = self.begin(), self.asked.messages
        if isinstance(talk, CaptionSession) and len(messages) > 1:
            raise ApiError(400, f"{self.model} writes captions; send one message with a picture", "messages")
        if messages[-1].role != "user":
            raise ApiError(400, "the last message must be the user's", "messages")
        for place, message in enumerate(messages):
            for part in message.content:
                if isinstance(part, ImagePart):
                    if message.role != "user":
                        raise ApiError(400, f"messages.{place}: only messages of the user have pictures", "messages")
                    talk.show(picture_of(part, self.settings, self.settings.trust), decode=False)
            if place < len(messages) - 1:
                talk.tell("system" if message.role == "developer" else message.role, message.marked)
        return talk, messages[-1].marked

    def whole(self, answers: list[Piece]) -> dict[str, Any]:
        """All answers, which have ended, in one body."""
        choices = [
            {"index": one.choice, "message": {"role": "assistant", "content": one.text}, **_ended(one.finish)} for one in answers
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": _usage(answers)}

    async def events(self, first: Piece, others: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        head, with_usage = (
            self._head("chat.completion.chunk"),
            bool(self.asked.stream_options and self.asked.stream_options.include_usage),
        )
        ended, sent, piece = list[Piece](), dict[int, str](), first

        def event(delta: dict[str, str], finish: str | None = None) -> str:
            choice = {"index": piece.choice, "delta": delta, **_ended(finish)}
            return _event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

        try:
            while True:
                if piece.choice not in sent:
                    yield event({"role": "assistant", "content": ""})
                before = sent.setdefault(piece.choice, "")
                same = _common(before, piece.text)
                # The end of a word may change what stands before it, and soon be as it was; what was sent cannot be taken back
                if piece.text[same:] and (same == len(before) or piece.finish):
                    sent[piece.choice] = piece.text
                    yield event({"content": piece.text[same:]})
                if piece.finish:
                    ended.append(piece)
                    yield event({}, piece.finish)
                try:
                    piece = await anext(others)
                except StopAsyncIteration:
                    break
            if with_usage:
                yield _event({**head, "choices": [], "usage": _usage(ended)})
        except Exception as error:
            traceback.print_exception(error)
            yield _event(ApiError(500, "the answer could not be finished; the server's terminal says why").content())
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": self.model}


def _ended(finish: str | None) -> dict[str, Any]:
    return {"finish_reason": finish, "logprobs": None}


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _usage(answers: list[Piece]) -> dict[str, int]:
    """Tokens of the one conversation and of all its answers."""
    asked, said = answers[0].prompt_tokens if answers else 0, sum(one.answer_tokens for one in answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _event(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"
