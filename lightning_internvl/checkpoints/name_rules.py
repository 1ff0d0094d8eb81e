"""How tensors of an official layout and ours become each other: one list of rules.

A rule pairs patterns of our names with official names. `*` stands for one word between dots, `**`
for the rest of the name; the n-th star of a name takes what the n-th star of our name has matched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]  # a `config.json`, or a part of one
Shapes = Mapping[str, tuple[int, ...]]
Convert = Callable[..., tuple[Tensor, ...]]


def _as_they_are(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class NameRule:
    """Some of our tensors and the official ones that hold the same numbers.

    `read` makes ours from the official ones, `write` the reverse; both must work on the meta
    device, where shapes are checked.
    """

    ours: tuple[str, ...]
    official: tuple[str, ...]
    read: Convert = _as_they_are
    write: Convert = _as_they_are


def rename(ours: str, official: str) -> NameRule:
    """The same tensor under another name."""
    return NameRule((ours,), (official,))


def joined_rows(ours: str, *official: str) -> NameRule:
    """Official tensors that are equal blocks of rows of one of ours, as those of `qkv` are."""
    return NameRule(
        (ours,),
        official,
        read=lambda *parts: (torch.cat(parts),),
        write=lambda rows: rows.chunk(len(official)),
    )


def stacked_rows(ours: Iterable[str], official: str) -> NameRule:
    """Our tensors as equal blocks of rows of an official one; reverses `joined_rows`."""
    names = tuple(ours)
    return NameRule(
        names,
        (official,),
        read=lambda rows: tuple(part.clone() for part in rows.chunk(len(names))),
        write=lambda *parts: (torch.cat(parts),),
    )


def scalar(ours: str, official: str) -> NameRule:
    """A number: without a dimension there, with one here, because sharding refuses scalars."""
    return NameRule((ours,), (official,), lambda x: (x.reshape(1),), lambda x: (x.reshape(()),))


@dataclass(frozen=True)
class RuleMatch:
    """A rule whose stars are filled in: the tensors of both sides by name."""

    rule: NameRule
    ours: tuple[str, ...]
    official: tuple[str, ...]

    def read(self, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by name."""
        tensors = self.rule.read(*(official[name] for name in self.official))
        return dict(zip(self.ours, tensors, strict=True))

    def write(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official tensors by name."""
        tensors = self.rule.write(*(ours[name] for name in self.ours))
        return dict(zip(self.official, tensors, strict=True))


def match_rules(rules: Iterable[NameRule], names: Iterable[str]) -> tuple[list[RuleMatch], list[str]]:
    """Our names by the first rule that fits them and lacks no part, and the names without one."""
    rules, present = list(rules), list(names)
    matches: dict[tuple[str, ...], RuleMatch] = {}
    unmatched: list[str] = []
    known = set(present)
    for name in present:
        fitting = filter(None, (_match(rule, name) for rule in rules))
        first = next((match for match in fitting if known.issuperset(match.ours)), None)
        if first is None:
            unmatched.append(name)
        else:
            matches[first.ours] = first
    return list(matches.values()), unmatched


def _match(rule: NameRule, name: str) -> RuleMatch | None:
    for pattern in rule.ours:
        if found := re.fullmatch(_regex(pattern), name):
            words = found.groups()
            ours = tuple(_fill_stars(own, words) for own in rule.ours)
            official = tuple(_fill_stars(theirs, words) for theirs in rule.official)
            return RuleMatch(rule, ours, official)
    return None


def _regex(pattern: str) -> str:
    stars = {"**": "(.+)", "*": "([^.]+)"}
    return "".join(stars.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*?)", pattern))


def _fill_stars(pattern: str, words: Iterable[str]) -> str:
    pieces, rest = re.split(r"(\*\*?)", pattern), iter(words)
    return "".join(next(rest) if piece.startswith("*") else piece for piece in pieces)
