"""What visitors of the page and the API may take, each of them and all together; more is refused."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import Self, TypeVar

from lightning_internvl.chat.settings import Limits
from lightning_internvl.messages import ConfigError

MB = 2**20
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of glibc's malloc.h
Item = TypeVar("Item")


class OverLimit(ValueError):
    """More than a visitor may take.

    Args:
        code: the HTTP status that says it: 413 where less would be taken, 429 where this visitor
            has to wait, 503 where all have to.
    """

    def __init__(self, message: str, code: int = 413) -> None:
        super().__init__(message)
        self.code = code


def check_conversation(limits: Limits, *, pictures: int, messages: int, characters: int) -> None:
    """Raise OverLimit for a conversation that is too long, with the setting that says how long."""
    found = {"max_pictures": (pictures, "pictures"), "max_messages": (messages, "messages")}
    found["max_characters"] = (characters, "characters")
    for name, (count, what) in found.items():
        if count > (most := getattr(limits, name)):
            raise OverLimit(f"the conversation has {count} {what}, more than {name}={most}; begin a new one")


class Pool:
    """An amount that visitors share.

    Args:
        what: stands there, for messages.
        setting: how much of it there is, for messages.
        total: for all visitors.
        share: of it that one of them may have.
        advice: for a visitor who has it.
    """

    def __init__(self, what: str, setting: str, total: float, share: float, advice: str) -> None:
        self.what, self.setting, self.total, self.share, self.advice = what, setting, total, share, advice
        self.taken: Counter[str] = Counter()

    def take(self, visitor: str, amount: float) -> None:
        """Count an amount to a visitor.

        Raises:
            OverLimit: if there is not as much left, for the visitor or for anyone.
        """
        if self.taken.total() + amount > self.total:
            raise OverLimit(f"{self.what} of all visitors fill {self.setting}; try again later", 503)
        if self.taken[visitor] + amount > max(1, self.total * self.share):
            raise OverLimit(f"{self.what} of one visitor fill the share of {self.share:g} of {self.setting}; {self.advice}", 429)
        self.taken[visitor] += amount  # type: ignore[assignment] # counts may have a fraction

    def give(self, visitor: str, amount: float) -> None:
        """Give an amount back."""
        self.taken[visitor] -= amount  # type: ignore[assignment]
        if self.taken[visitor] <= 0:
            del self.taken[visitor]


class Holding(AbstractContextManager["Holding"]):
    """What one conversation, or one request, has taken of a pool; given back when it is closed."""

    def __init__(self, pool: Pool, visitor: str) -> None:
        self.pool, self.visitor, self.amount, self.is_closed = pool, visitor, 0.0, False

    def take(self, amount: float) -> None:
        """Take more. Raises OverLimit as `Pool.take`, for what would never be there, and once it is closed."""
        if self.is_closed:
            raise OverLimit("the conversation has been ended", 409)
        if self.amount + amount > max(1, self.pool.total * self.pool.share):
            most = f"the share of {self.pool.share:g} of {self.pool.setting}"
            raise OverLimit(f"these {self.pool.what} alone are more than {most}; send fewer or smaller ones")
        self.pool.take(self.visitor, amount)
        self.amount += amount

    def leave(self, amount: float) -> None:
        """Keep that much of it and give the rest back."""
        if not self.is_closed:
            self.pool.give(self.visitor, self.amount - amount)
            self.amount = amount

    def close(self) -> None:
        """Give all back."""
        self.leave(0)
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Turns:
    """Whose question is answered: `max_parallel` at a time, the others wait in order.

    Attributes:
        memory: of the pictures that are held, in bytes of their files.
    """

    def __init__(self, limits: Limits) -> None:
        self.free = asyncio.Semaphore(limits.max_parallel)
        waiting, memory = f"max_waiting={limits.max_waiting}", f"max_memory_mb={limits.max_memory_mb:g}"
        self.waiting = Pool("questions", waiting, limits.max_waiting, limits.max_share, "wait for their answers")
        self.memory = Pool("pictures", memory, limits.max_memory_mb * MB, limits.max_share, "end a conversation first")

    @asynccontextmanager
    async def turn(self, visitor: str) -> AsyncIterator[None]:
        """Inside, it is the visitor's turn. Raises OverLimit if too many wait already."""
        if self.free.locked():
            with Holding(self.waiting, visitor) as place:
                place.take(1)
                await self.free.acquire()
        else:
            await self.free.acquire()
        try:
            yield
        finally:
            self.free.release()


async def in_a_thread(computed: Iterator[Item]) -> AsyncGenerator[Item]:
    """What a generator computes, while others are served; it is closed with this iterator."""
    import anyio

    try:
        while (item := await anyio.to_thread.run_sync(next, computed, None)) is not None:
            yield item
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(computed.close)  # type: ignore[attr-defined] # which a generator has


def share_heaps() -> None:
    """Let all threads of this process share two heaps, and give large blocks back at once. Each
    would keep for itself what its answers took; glibc makes eight for every core."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            library = ctypes.CDLL(None)
            library.mallopt(M_ARENA_MAX, 2)
            library.mallopt(M_MMAP_THRESHOLD, MB)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: for a port that is taken, or a host that is not this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        fault = f"host={host} port={port} cannot be used ({error.strerror or error})"
        raise ConfigError([f"{fault}; port=0 takes any free one"]) from error


def told_of_access(host: str, is_local: bool, password: str | None) -> str | None:
    """A line for who starts a server that others reach."""
    if password is None:
        open_to = f"host={host}: everyone who reaches this machine can use it; give a password (docs/chat.md)"
        return None if is_local else open_to
    return "visitors are asked for the password" + ("" if is_local else f"; host={host} sends it unencrypted")
