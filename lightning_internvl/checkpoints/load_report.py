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
    """What a stage takes over: names loaded, new (fresh weights) and dropped (in the source, not in this model).

    Position tables of another size are loaded resized, which is how a stage changes the resolution.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: VLM, tensors: Mapping[str, Tensor], *, source: str, new: Iterable[str], dropped: Iterable[str]
    ) -> LoadReport:
        """Compare a source with a model; both may be on the meta device.

        Args:
            source: what the tensors are called in messages.
            new, dropped: patterns or roles of names that may be missing in the source, and of those that may be left over.

        Raises:
            ValueError: for a tensor of another shape, or a name that is missing or left over and not declared so.
        """
        roles = model_roles(model)
        wanted, new, dropped = own_tensors(model), all_names(new, roles, "new"), all_names(dropped, roles, "dropped")
        loaded = [name for name in wanted if name in tensors]
        misfits = [name for name in loaded if tensors[name].shape != wanted[name].shape]
        resized = [name for name in misfits if _is_table(name, tensors[name], wanted[name])]
        wrong = [f"{n}: {tuple(tensors[n].shape)}, {tuple(wanted[n].shape)}" for n in misfits if n not in resized]
        if wrong:
            more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"{source} has tensors of another shape (there, in this model):{in_groups(wrong[:8])}{more}")
        new_names, left_names = [n for n in wanted if n not in tensors], [n for n in tensors if n not in wanted]
        report = cls(source, loaded, new_names, left_names, resized)
        if missing := [n for n in report.new if not (is_update(n) or any(matches(n, p) for p in new))]:
            raise ValueError(f"{source} lacks names that the stage does not list under `new`:{in_groups(missing)}")
        if left := [n for n in report.dropped if not any(matches(n, p) for p in dropped)]:
            raise ValueError(
                f"{source} has names that the model lacks and the stage does not list under `dropped`:{in_groups(left)}"
            )
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


def _is_table(name: str, there: Tensor, here: Tensor) -> bool:
    """Whether a tensor is a learned position table (1, 1 + grid * grid, D) that can be resized to another grid."""
    tables = there.ndim == here.ndim == 3 and there.shape[::2] == here.shape[::2]
    return (
        name.endswith("position_embedding")
        and tables
        and all(round((t.shape[1] - 1) ** 0.5) ** 2 == t.shape[1] - 1 for t in (there, here))
    )


def in_groups(names: list[str], limit: int = 8) -> str:
    """Names one a line; of many, how many lie in each group."""
    if len(names) > limit:
        groups = Counter(_group(name) for name in names)
        names = [f"{group} ({count} {'name' if count == 1 else 'names'})" for group, count in groups.items()]
    return "".join(f"\n  {name}" for name in names)


def _group(name: str) -> str:
    """A part and the module right below it."""
    return ".".join(name.split(".")[:2])
