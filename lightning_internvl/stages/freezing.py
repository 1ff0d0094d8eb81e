"""Which parameters train, as a pure function of (stage, step).

Rules are read from the stage's YAML, in order; the first that matches a parameter's name speaks for
it, and what no rule names is frozen:

    train:
      - middleware.query_tokens                                  # always
      - {name: "middleware.*.cross_attn", from_step: 100}        # joins at step 100
      - {name: encoder, until_step: 500}                         # freezes at step 500
      - {name: middleware.@language_head, frozen: true}          # never, though a rule below names
        its part

A name is a part, a module, a parameter, a pattern with `*`, or what has a role in a part (see
`lightning_internvl.stages.roles`). Of a part with adapters (`peft`) the adapters train, and what a
rule names more closely than by the part itself, such as `decoder.lm.model.embed_tokens`; its other
weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_internvl.layers.peft import is_update, plain_name
from lightning_internvl.layers.quantization import true_numel
from lightning_internvl.stages.roles import Roles, names_of


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is the pattern, or lies below it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def check_matches(pattern: str, names: Iterable[str], setting: str) -> None:
    """Refuse a pattern of a setting that matches none of the names."""
    names = list(names)
    if not any(matches(name, pattern) for name in names):
        beginnings = sorted({".".join(name.split(".")[:2]) for name in names})
        known = f"names here begin with {', '.join(beginnings)}"
        raise ValueError(f"{setting}: {pattern!r} matches no parameter; {known}")


@dataclass(frozen=True)
class TrainRule:
    """One line of `train:`; trains from `from_step` (inclusive) until `until_step` (exclusive), or
    never if `frozen`."""

    name: str
    from_step: int = 0
    until_step: int | None = None
    title: str = ""
    frozen: bool = False

    def active(self, step: int) -> bool:
        return step >= self.from_step and (self.until_step is None or step < self.until_step)

    def __str__(self) -> str:
        if self.frozen:
            return f"{self.title or self.name} is frozen"
        until = "" if self.until_step is None else f" until step {self.until_step}"
        return f"{self.title or self.name}{f' from step {self.from_step}' if self.from_step else ''}{until}"


class FreezePlan:
    """The freezing schedule of one stage.

    Args:
        adapters: settings of the adapters by part (see `lightning_internvl.layers.peft`).
        roles: the roles that the parts give names (see `lightning_internvl.stages.roles`); rules
            may name these.

    Raises:
        ValueError: for a rule that is not understood.
    """

    def __init__(
        self,
        rules: Iterable[str | Mapping[str, Any]],
        adapters: Mapping[str, Any] | None = None,
        roles: Roles | None = None,
    ) -> None:
        self.rules = [one for rule in rules for one in _by_name(_parse(rule), roles or {})]
        self.adapters = {part: own for part, own in (adapters or {}).items() if own}

    def rule(self, name: str) -> TrainRule | None:
        """The rule by which a parameter trains."""
        rule = self._speaking(name)
        return None if rule is None or rule.frozen else rule

    def _speaking(self, name: str) -> TrainRule | None:
        part = name.partition(".")[0]
        fitting = (rule for rule in self.rules if matches(plain_name(name), rule.name))
        if part not in self.adapters:
            return next(fitting, None)
        if is_update(name):
            own = self.adapters[part]
            return TrainRule(part, *self._times(part), title=f"{own['method']} of rank {own['rank']}")
        return next((rule for rule in fitting if rule.name != part), None)

    def _times(self, part: str) -> tuple[int, int | None]:
        """From when until when adapters train: as their part's rule says, or always."""
        own = next((rule for rule in self.rules if rule.name == part), None)
        return (own.from_step, own.until_step) if own else (0, None)

    def trains(self, name: str, step: int) -> bool:
        """Whether a parameter trains at a step."""
        rule = self.rule(name)
        return rule is not None and rule.active(step)

    def ever_trains(self, name: str) -> bool:
        """Whether the optimizer must hold the parameter."""
        return self.rule(name) is not None

    def changes(self) -> list[int]:
        """Steps at which the state may differ from the step before, 0 among them."""
        ends = {rule.until_step for rule in self.rules if rule.until_step is not None}
        steps = {0} | {rule.from_step for rule in self.rules} | ends
        return sorted(steps)

    def check(self, model: nn.Module) -> None:
        """Refuse rules that match nothing, which are most often typing errors. Objectives may be
        without parameters, and a part without what has a role."""
        names = [plain_name(name) for name, _ in model.named_parameters()]
        objectives = getattr(model, "objectives", None) or {}
        present = {"objectives"} | {f"objectives.{name}" for name in objectives} if len(objectives) else set()
        for rule in self.rules:
            if rule.name not in present and not rule.title:
                check_matches(rule.name, names, "train")

    def check_moves(self, model: nn.Module, steps: int, stage: str) -> None:
        """Refuse rules by which nothing trains in the `steps` of a stage, whose loss could not
        move."""
        times = [step for step in self.changes() if step < steps]
        names = [name for name, _ in model.named_parameters()]
        if not names or any(self.trains(name, step) for step in times for name in names):
            return
        first = min((step for step in self.changes() if any(self.trains(name, step) for name in names)), default=None)
        why = "its rules leave every parameter frozen" if first is None else f"the first rule begins at step {first} of {steps}"
        raise ValueError(f"train: nothing would train, {why}; name a part in stages.{stage}.module.train, as in [middleware]")

    def apply(self, model: nn.Module, step: int) -> None:
        """Set `requires_grad`, and put parts in which nothing trains into evaluation mode (no
        dropout, no drop path)."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name, step))
            if not parameter.requires_grad:
                parameter.grad = None
        for part in model.children():
            part.train(any(p.requires_grad for p in part.parameters()))

    def table(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Rows for the log: group, parameters trained and frozen, and why; a group is a part or a
        module right below it."""
        rows: dict[str, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            row = rows.setdefault(".".join(name.split(".")[:2]), {"trained": 0, "frozen": 0, "rules": []})
            row["trained" if self.trains(name, step) else "frozen"] += true_numel(name, parameter)
            part = name.partition(".")[0]
            held = f"held by {part}'s adapters" if part in self.adapters else ""
            reason = str(self._speaking(name) or held or "not listed under train")
            row["rules"] += [reason] if reason not in row["rules"] else []
        return [
            {"group": group, "trained": row["trained"], "frozen": row["frozen"], "why": "; ".join(row["rules"])}
            for group, row in rows.items()
        ]


def _parse(rule: str | Mapping[str, Any]) -> TrainRule:
    if isinstance(rule, str):
        return TrainRule(rule)
    unknown = set(rule) - {"name", "from_step", "until_step", "frozen"}
    if unknown or "name" not in rule:
        keys = "name, from_step, until_step, frozen (name is required)"
        raise ValueError(f"train: {dict(rule)} is not understood; valid keys are {keys}")
    if rule.get("frozen"):
        if set(rule) != {"name", "frozen"}:
            advice = f"write {{name: {rule['name']}, frozen: true}}"
            raise ValueError(f"train: {dict(rule)}: what is frozen has no steps; {advice}")
        return TrainRule(rule["name"], frozen=True)
    parsed = TrainRule(rule["name"], int(rule.get("from_step") or 0), rule.get("until_step"))
    if parsed.from_step < 0 or (parsed.until_step is not None and parsed.until_step <= parsed.from_step):
        raise ValueError(f"train: {dict(rule)} never trains; it needs 0 <= from_step < until_step")
    return parsed


def _by_name(rule: TrainRule, roles: Roles) -> list[TrainRule]:
    """A rule as rules of name patterns; a role that it names is their title."""
    names = names_of(rule.name, roles, "train")
    return [rule if name == rule.name else replace(rule, name=name, title=rule.name) for name in names]
