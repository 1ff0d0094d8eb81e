"""Loaded, new and dropped names of weights that a model takes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_internvl.layers.basic import resize_positions
from lightning_internvl.layers.peft import is_update, start_magnitudes
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.freezing import matches
from lightning_internvl.stages.roles import all_names, model_roles


@dataclass
class LoadReport:
    """What a stage takes over: names loaded, new (fresh) and dropped (in the source alone).

    Position tables of another size are loaded resized: a stage may change the resolution.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: VLM,
        tensors: Mapping[str, Tensor],
        *,
        source: str,
        new: Iterable[str],
        dropped: Iterable[str],
    ) -> LoadReport:
        """Compare a source with a model; both may be on the meta device.

        Args:
            source: what the tensors are called in messages.
            new, dropped: patterns or roles of names that may be missing in the source, and of those
                that may be left over. A name that stands whole in `new` may have another shape
                there, as that of another middleware has.

        Raises:
            ValueError: for a tensor of another shape, or a name that is missing or left over and
                not declared so.
        """
        wanted, roles = own_tensors(model), model_roles(model)
        listed = list(new)
        new, dropped = all_names(listed, roles, "new"), all_names(dropped, roles, "dropped")
        report = cls(source)
        misfits: dict[str, str] = {}
        for name, tensor in wanted.items():
            there = tensors.get(name)
            fits = there is not None and (there.shape == tensor.shape or _is_position_table(name, there, tensor))
            if there is None or (not fits and name in new):
                report.new.append(name)
                continue
            report.loaded.append(name)
            if fits and there.shape != tensor.shape:
                report.resized.append(name)
            elif not fits:
                misfits[name] = f"{name}: {tuple(there.shape)}, {tuple(tensor.shape)}"
        report.dropped = [name for name in tensors if name not in wanted]
        if misfits:
            more = f"\n  ... and {len(misfits) - 8} more" if len(misfits) > 8 else ""
            lines = lines_of_names([*misfits.values()][:8])
            raise ValueError(
                f"{source} has tensors of another shape (there, in this model):{lines}{more}\n{_afresh(listed, misfits)}"
            )
        undeclared = _unmatched(report.new, new)
        if missing := [name for name in undeclared if not is_update(name)]:
            unlisted = "names that the stage does not list under `new`"
            parts = [name.partition(".")[0] for name in missing]
            raise ValueError(f"{source} lacks {unlisted}:{lines_of_names(missing)}\n{_afresh(listed, parts)}")
        if left := _unmatched(report.dropped, dropped):
            unlisted = "names that the model lacks and the stage does not list under `dropped`"
            raise ValueError(f"{source} has {unlisted}:{lines_of_names(left)}")
        return report

    def load(self, model: VLM, tensors: Mapping[str, Tensor]) -> None:
        """Copy the loaded names into the model."""
        own = own_tensors(model)
        with torch.no_grad():
            for name in self.loaded:
                tensor = tensors[name]
                if name in self.resized:
                    tensor = resize_positions(tensor, round((own[name].shape[1] - 1) ** 0.5))
                own[name].copy_(tensor)
        start_magnitudes(model, self.new)

    def counts(self) -> dict[str, dict[str, int]]:
        """Tensors loaded, new and dropped by group (a part and the module right below it)."""
        kinds = {kind: Counter(map(_group, getattr(self, kind))) for kind in ("loaded", "new", "dropped")}
        groups = dict.fromkeys(_group(name) for name in [*self.loaded, *self.new, *self.dropped])
        return {group: {kind: count[group] for kind, count in kinds.items()} for group in groups}


def _afresh(listed: Iterable[str], more: Iterable[str]) -> str:
    """How a stage says that more names start afresh."""
    return f"to start them afresh: stages.NAME.new=[{','.join(dict.fromkeys([*listed, *more]))}]"


def _unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [name for name in names if not any(matches(name, pattern) for pattern in patterns)]


def _is_position_table(name: str, there: Tensor, here: Tensor) -> bool:
    """Whether a tensor is a learned position table (1, 1 + grid * grid, D) that can be resized."""
    if not name.endswith("position_embedding") or not there.ndim == here.ndim == 3:
        return False
    patches = [tensor.shape[1] - 1 for tensor in (there, here)]
    return there.shape[::2] == here.shape[::2] and all(round(n**0.5) ** 2 == n for n in patches)


def lines_of_names(names: list[str], limit: int = 8) -> str:
    """Names one a line; of many, how many lie in each group."""
    if len(names) > limit:
        groups = Counter(_group(name) for name in names)
        counted = {group: f"{count} name{'s'[: count > 1]}" for group, count in groups.items()}
        names = [f"{group} ({count})" for group, count in counted.items()]
    return "".join(f"\n  {name}" for name in names)


def _group(name: str) -> str:
    """A part and the module right below it."""
    return ".".join(name.split(".")[:2])
