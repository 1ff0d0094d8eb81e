"""How much of some records is not read: an account that both the check and training show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_internvl.messages import first_of

LOOKED_AT = 2000  # records of a stage's data, before it trains
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

    def described(self) -> str:
        """What was not read, the most frequent first; empty if nothing."""
        return first_of((f"{kind} ({count:,})" for kind, count in self.kinds.most_common()), 8)

    def fault(self, limit: float) -> str | None:
        """What is wrong if the share of records with something unread is above `limit`."""
        if self.incomplete <= limit * self.records:
            return None
        share = f"{self.incomplete:,} of {self.records:,} records hold something that is not read: {self.described()}"
        advice = f"rename or remove it; or {SETTING}=1, if it need not be learnt"
        return f"{share}; more than {SETTING}={limit}. What is read: docs/data.md; {advice}"
