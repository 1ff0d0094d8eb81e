"""The conversations of the page's visitors, in the limits that they share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import anyio

from lightning_internvl.chat.limits import Holding, OverLimit, Turns, check_conversation, in_a_thread
from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.chat.settings import Limits


class Talk:
    """A visitor's conversation.

    Attributes:
        session: what was said.
        held: the memory that its pictures take.
        is_answered: whether an answer to it is being written, or waited for.
        is_stopped: whether nobody wants that answer any more.
        is_left: whether its page is closed; its pictures go when others need their room.
    """

    def __init__(self, session: Session, held: Holding) -> None:
        self.session, self.held = session, held
        self.is_answered = self.is_stopped = self.is_left = False

    def stop(self) -> None:
        """End the answer that is being written, or waited for."""
        self.is_stopped = True
        self.session.stop()

    def close(self) -> None:
        """End it; its pictures are forgotten."""
        self.is_stopped = True
        self.session.reset()
        self.held.close()


class Talks:
    """The conversations of all visitors, and what they may take.

    Args:
        begin: begins a conversation.
    """

    def __init__(self, begin: Callable[[], Session], limits: Limits) -> None:
        self.begin, self.limits, self.turns = begin, limits, Turns(limits)
        self.of: dict[str, Talk] = {}  # the page that shows each

    def new(self, visitor: str, page: str) -> Talk:
        """A conversation that begins."""
        self.end(self.of.get(page))
        self.of[page] = Talk(self.begin(), Holding(self.turns.memory, visitor))
        return self.of[page]

    def leave(self, page: str) -> None:
        """The page was closed, or its connection broke; it may come back."""
        if page in self.of:
            self.of[page].is_left = True

    def end(self, talk: Talk | None) -> None:
        """Forget a conversation."""
        if talk is not None:
            talk.close()
            self.of = {page: one for page, one in self.of.items() if one is not talk}

    async def answer(self, talk: Talk, question: str, files: list[str], sampling: Sampling) -> AsyncGenerator[str]:
        """The answer as far as it is written, again and again.

        Args:
            files: paths of pictures that are shown with the question.

        Raises:
            ValueError: for a question that cannot be asked; the conversation is then as it was.
        """
        session, before, held = talk.session, len(talk.session.pictures), talk.held.amount
        if talk.held.is_closed:
            raise OverLimit("the conversation was ended while its page was closed, to make room; begin a new one", 409)
        if talk.is_answered:
            raise OverLimit("your last question is still being answered; stop it, or wait", 429)
        talk.is_answered, talk.is_stopped, talk.is_left = True, False, False
        try:
            said = sum(len(message["content"]) for message in session.messages) + len(question)
            shown, messages = before + len(files), len(session.messages) + 1
            check_conversation(self.limits, pictures=shown, messages=messages, characters=said)
            async with self.turns.turn(talk.held.visitor):
                if talk.is_stopped:
                    raise ValueError("stopped before it was answered")
                for file in files:
                    self._hold(talk, Path(file).stat().st_size)
                    await anyio.to_thread.run_sync(session.show, file, False)
                async with aclosing(in_a_thread(session.ask(question, sampling))) as texts:
                    async for text in texts:
                        yield text
        except ValueError:
            del session.pictures[before:], session.sources[before:]
            talk.held.leave(held)
            raise
        finally:
            talk.is_answered = False

    def _hold(self, talk: Talk, size: int) -> None:
        """Count a picture to a conversation; where there is no room those go whose page is closed."""
        try:
            talk.held.take(size)
        except OverLimit:
            for one in [one for one in self.of.values() if one.is_left and one.held.amount]:
                self.end(one)
            talk.held.take(size)
