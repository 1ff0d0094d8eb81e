"""How much of some records is not read: an account that both the check and training show.

Of files it is taken before training. Streams are read once, so theirs is taken of the records that
are trained on, the first `LOOKED_AT` of each process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_internvl.messages import first_of

LOOKED_AT = 2000  # records of a stage's data
STREAMED = 100  # records of a stream before their share says something
UNREAD = "unread"  # what travels with a batch of a stream: of each record what was not read
SETTING = "data.max_unread_fraction"


@dataclass
class UnreadAccount:
    """Records that were read, those of which something was not, and what."""

    records: int = 0
    incomplete: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, unread: Sequence[str]) -> None:
        """Enter one record."""
        self.records += 1
        self.incomplete += bool(unread)
        self.kinds.update(set(unread))

    @property
    def line(self) -> str | None:
        """What was found, as a line for the user; None if all of every record was read."""
        looked = f"{self.incomplete:,} of {self.records:,} records hold something that is not read"
        return f"{looked}: {self.described()}" if self.incomplete else None

    def described(self) -> str:
        """What was not read, the most frequent first; empty if nothing."""
        return first_of((f"{kind} ({count:,})" for kind, count in self.kinds.most_common()), 8)

    def fault(self, limit: float) -> str | None:
        """What is wrong if the share of records with something unread is above `limit`."""
        if self.incomplete <= limit * self.records:
            return None
        advice = f"rename or remove it; or {SETTING}=1, if it need not be learnt"
        return f"{self.line}; more than {SETTING}={limit}. What is read: docs/data.md; {advice}"


class StreamedAccount(UnreadAccount):
    """The account of a stream, batch by batch."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.told = False

    def enter(self, batch: Sequence[Sequence[str]]) -> str | None:
        """What was not read of the records of a batch; a line for the user once, when the share says
        something.

        Raises:
            ValueError: if it is above the limit.
        """
        if self.records < LOOKED_AT:
            for unread in batch:
                self.add(unread)
            if self.records >= STREAMED and (fault := self.fault(self.limit)):
                raise ValueError(fault)
        return self.end() if self.records >= STREAMED else None

    def end(self) -> str | None:
        """The line, where it was not told yet."""
        told, self.told = self.told, True
        return None if told else self.line
