"""What a finished run says of itself: its configuration, what it trained, and in how many steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_internvl.checkpoints import handoff
from lightning_internvl.choices import PARTS
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import PartsSettings
from lightning_internvl.config.targets import locate, with_current_targets
from lightning_internvl.config.trust import is_trusted
from lightning_internvl.files import RUN_CONFIG, parsed_yaml, read_json
from lightning_internvl.inference.load_run import LoadedRun, run_of
from lightning_internvl.layers.peft import is_update
from lightning_internvl.model.compose import TRUSTED
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import roles_of


def trained_names(opened: LoadedRun, names: Iterable[str]) -> list[str]:
    """The tensors that some stage of the run has trained."""
    stages = RunSettings.of(run_config(opened)).trained
    plans = []
    for stage in stages:
        roles = roles_of(_part_classes(stage.parts))
        plans.append(FreezePlan(stage.module["train"], stage.parts.peft, roles))
    return [name for name in names if any(plan.ever_trains(name) for plan in plans)]


def part_sizes(held: Mapping[str, Tensor], learnt: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """How many numbers each part has, and how many were trained, its adapters as they were before
    they were added."""

    def count(part: str, tensors: Mapping[str, Tensor]) -> int:
        return sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{part}."))

    return {part: (count(part, held), count(part, learnt)) for part in PARTS if count(part, held)}


def made_steps(opened: LoadedRun) -> dict[str, int]:
    """The steps that the finished stages of a run made, as their hand-offs say."""
    folders = (run_of(opened.folder) / "handoff").glob(f"*/{handoff.MANIFEST}")
    manifests = [read_json(path) for path in folders] + [read_json(opened.folder / handoff.MANIFEST)]
    return {manifest["stage"]: manifest["step"] for manifest in manifests}


def _part_classes(parts: PartsSettings) -> dict[str, type]:
    """The classes of a stage's parts; `object` for one that is not trusted, which is not
    imported."""
    nodes = {part: getattr(parts, part) for part in PARTS}
    targets = {part: node["_target_"] for part, node in nodes.items() if node}
    known = {part: target.startswith(TRUSTED) or is_trusted(target) for part, target in targets.items()}
    return {part: locate(target) if known[part] else object for part, target in targets.items()}


def adapted_weight(name: str) -> str:
    """The weight to which the tensor of an adapter is added; any other name as it is."""
    return f"{name.partition('.lora_')[0]}.weight" if is_update(name) else name


def run_config(opened: LoadedRun) -> dict[str, Any]:
    """The resolved configuration of the run."""
    text = (run_of(opened.folder) / RUN_CONFIG).read_text(encoding="utf-8")
    return with_current_targets(parsed_yaml(text))
