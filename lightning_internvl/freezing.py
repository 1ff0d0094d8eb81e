"""Which parameters train, as a pure function of (stage, step).

Rules are read from the stage's YAML, in order; the first that matches a parameter's name speaks for it, and what no rule
names is frozen:

    train:
      - middleware.query_tokens                                  # always
      - {name: "middleware.*.cross_attn", from_step: 100}        # joins at step 100
      - {name: encoder, until_step: 500}                         # freezes at step 500

A name is a part, a module, a parameter, or a pattern with `*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is the pattern, or lies below it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def check_matches(pattern: str, names: Iterable[str], setting: str) -> None:
    """Refuse a pattern of a setting that matches none of the names."""
    names = list(names)
    if not any(matches(name, pattern) for name in names):
        beginnings = sorted({".".join(name.split(".")[:2]) for name in names})
        raise ValueError(f"{setting}: {pattern!r} matches no parameter; names here begin with {', '.join(beginnings)}")


@dataclass(frozen=True)
class Rule:
    """One line of `train:`; trains from `from_step` (inclusive) until `until_step` (exclusive)."""

    name: str
    from_step: int = 0
    until_step: int | None = None

    def active(self, step: int) -> bool:
        return step >= self.from_step and (self.until_step is None or step < self.until_step)

    def __str__(self) -> str:
        until = "" if self.until_step is None else f" until step {self.until_step}"
        return f"{self.name}{f' from step {self.from_step}' if self.from_step else ''}{until}"


class FreezePlan:
    """The freezing schedule of one stage.

    Raises:
        ValueError: for a rule that is not understood.
    """

    def __init__(self, rules: Iterable[str | Mapping[str, Any]]) -> None:
        self.rules = [_parse(rule) for rule in rules]

    def rule(self, name: str) -> Rule | None:
        """The rule that speaks for a parameter."""
        return next((rule for rule in self.rules if matches(name, rule.name)), None)

    def trains(self, name: str, step: int) -> bool:
        """Whether a parameter trains at a step."""
        rule = self.rule(name)
        return rule is not None and rule.active(step)

    def ever_trains(self, name: str) -> bool:
        """Whether the optimizer must hold the parameter."""
        return self.rule(name) is not None

    def changes(self) -> list[int]:
        """Steps at which the state may differ from the step before, 0 among them."""
        steps = {0} | {r.from_step for r in self.rules} | {r.until_step for r in self.rules if r.until_step is not None}
        return sorted(steps)

    def check(self, model: nn.Module) -> None:
        """Refuse rules that match nothing, which are most often typing errors."""
        names = [name for name, _ in model.named_parameters()]
        for rule in self.rules:
            check_matches(rule.name, names, "train")

    def apply(self, model: nn.Module, step: int) -> None:
        """Set `requires_grad`, and put parts in which nothing trains into evaluation mode (no dropout, no drop path)."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name, step))
            if not parameter.requires_grad:
                parameter.grad = None
        for part in model.children():
            part.train(any(p.requires_grad for p in part.parameters()))

    def table(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Rows for the log: group, parameters trained and frozen, and why; a group is a part or a module right below it."""
        rows: dict[str, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            row = rows.setdefault(".".join(name.split(".")[:2]), {"trained": 0, "frozen": 0, "rules": []})
            row["trained" if self.trains(name, step) else "frozen"] += parameter.numel()
            reason = str(self.rule(name) or "not listed under train")
            row["rules"] += [reason] if reason not in row["rules"] else []
        return [
            {"group": group, "trained": row["trained"], "frozen": row["frozen"], "why": "; ".join(row["rules"])}
            for group, row in rows.items()
        ]


def _parse(rule: str | Mapping[str, Any]) -> Rule:
    if isinstance(rule, str):
        return Rule(rule)
    unknown = set(rule) - {"name", "from_step", "until_step"}
    if unknown or "name" not in rule:
        raise ValueError(f"train: {dict(rule)} is not understood; valid keys are name, from_step, until_step (name is required)")
    parsed = Rule(rule["name"], int(rule.get("from_step") or 0), rule.get("until_step"))
    if parsed.from_step < 0 or (parsed.until_step is not None and parsed.until_step <= parsed.from_step):
        raise ValueError(f"train: {dict(rule)} never trains; it needs 0 <= from_step < until_step")
    return parsed
