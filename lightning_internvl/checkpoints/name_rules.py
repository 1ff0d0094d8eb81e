"""How the tensors of an official layout and ours become each other, in both directions from one list of rules.

A rule pairs patterns of our names with official names. `*` stands for one word between dots, `**` for the rest of the name; the
n-th star of a name takes what the n-th star of our first name has matched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Convert = Callable[..., tuple[Tensor, ...]]


def _as_they_are(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some of our tensors and the official ones that hold the same numbers.

    `read` makes ours from the official ones, `write` the reverse; both must work on the meta device, where shapes are checked.
    """

    ours: tuple[str, ...]
    official: tuple[str, ...]
    read: Convert = _as_they_are
    write: Convert = _as_they_are


def rename(ours: str, official: str) -> Rule:
    """The same tensor under another name."""
    return Rule((ours,), (official,))


def joined_rows(ours: str, *official: str) -> Rule:
    """Official tensors that are equal blocks of rows of one of ours, as query, key and value are of `qkv`."""
    return Rule((ours,), official, read=lambda *parts: (torch.cat(parts),), write=lambda whole: whole.chunk(len(official)))


def stacked_rows(ours: Iterable[str], official: str) -> Rule:
    """Our tensors that are equal blocks of rows of one official one, the reverse of `joined_rows`."""
    names = tuple(ours)
    return Rule(
        names,
        (official,),
        read=lambda whole: tuple(part.clone() for part in whole.chunk(len(names))),
        write=lambda *parts: (torch.cat(parts),),
    )


def scalar(ours: str, official: str) -> Rule:
    """A number: without a dimension there, with one here, because sharding refuses scalars."""
    return Rule((ours,), (official,), read=lambda x: (x.reshape(1),), write=lambda x: (x.reshape(()),))


@dataclass(frozen=True)
class Group:
    """A rule with its stars filled in."""

    rule: Rule
    ours: tuple[str, ...]
    official: tuple[str, ...]

    def read(self, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by name."""
        return dict(zip(self.ours, self.rule.read(*(official[name] for name in self.official)), strict=True))

    def write(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official tensors by name."""
        return dict(zip(self.official, self.rule.write(*(ours[name] for name in self.ours)), strict=True))


def grouped(rules: Iterable[Rule], names: Iterable[str]) -> tuple[list[Group], list[str]]:
    """Our names by the first rule that fits them and lacks no part, and the names for which there is none."""
    rules, present = list(rules), list(names)
    groups: dict[tuple[str, ...], Group] = {}
    homeless: list[str] = []
    known = set(present)
    for name in present:
        fitting = filter(None, (_group(rule, name) for rule in rules))
        group = next((g for g in fitting if known.issuperset(g.ours)), None)
        if group is None:
            homeless.append(name)
        else:
            groups[group.ours] = group
    return list(groups.values()), homeless


def _group(rule: Rule, name: str) -> Group | None:
    for pattern in rule.ours:
        if match := re.fullmatch(_expression(pattern), name):
            fill = list(match.groups())
            return Group(rule, tuple(_filled(p, fill) for p in rule.ours), tuple(_filled(p, fill) for p in rule.official))
    return None


def _expression(pattern: str) -> str:
    return "".join({"**": "(.+)", "*": "([^.]+)"}.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*?)", pattern))


def _filled(pattern: str, words: list[str]) -> str:
    pieces, rest = re.split(r"(\*\*?)", pattern), iter(words)
    return "".join(next(rest) if piece.startswith("*") else piece for piece in pieces)
