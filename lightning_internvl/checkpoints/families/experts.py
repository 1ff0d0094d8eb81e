"""Experts of a language model: published files hold a tensor for each, transformers 5 one for all of
a block.

Letters: E experts, I width inside one, H width of the model.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import AutoConfig

from lightning_internvl.checkpoints.name_rules import Config, NameRule
from lightning_internvl.layers.hf_config import make_config

# Language models whose files hold each expert's three projections. Those of GPT-OSS hold what
# transformers holds.
EXPERTS = ("model_type", "num_experts", "num_local_experts")
ONE_BY_ONE = ("qwen2_moe", "qwen3_moe", "olmoe")


def number_of_experts(config: Config) -> int:
    """E, under the name of either release of transformers, else the architecture's own."""
    fields = {key: value for key, value in copy.deepcopy(config).items() if key in EXPERTS}
    return int(make_config(AutoConfig, fields, "config").num_experts)


def expert_rules(config: Config, prefix: str) -> list[NameRule]:
    """How the tensors of single experts below `prefix` become those of a block; none for a language
    model without experts."""
    if config.get("model_type") not in ONE_BY_ONE:
        return []
    count = number_of_experts(config)
    ours, theirs = "decoder.lm.model.layers.*.mlp.experts", f"{prefix}model.layers.*.mlp.experts"
    gates, ups, downs = ([f"{theirs}.{i}.{kind}_proj.weight" for i in range(count)] for kind in ("gate", "up", "down"))
    return [
        NameRule((f"{ours}.gate_up_proj",), (*gates, *ups), _joined, _parted),
        NameRule((f"{ours}.down_proj",), tuple(downs), lambda *parts: (torch.stack(parts),), lambda rows: rows.unbind()),
    ]


def _joined(*parts: Tensor) -> tuple[Tensor, ...]:
    """The gates (I, H) of all experts, then their ups -> (E, 2 * I, H)."""
    count = len(parts) // 2
    return (torch.cat([torch.stack(parts[:count]), torch.stack(parts[count:])], dim=1),)


def _parted(rows_EIH: Tensor) -> tuple[Tensor, ...]:
    gates, ups = rows_EIH.chunk(2, dim=1)
    return (*gates.unbind(), *ups.unbind())


def older_expert_fields(config: Config) -> Config:
    """The number of experts as releases before transformers 5 and vLLM read it; they would take
    their default in silence."""
    return {"num_experts": number_of_experts(config)} if config.get("model_type") in ONE_BY_ONE else {}
