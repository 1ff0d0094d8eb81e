"""A language model with LoRA on some of its projections (Hu et al. 2021), through PEFT: what XComposer trains in the end.

Letters: see `hf_causal`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_internvl.decoders.hf_causal import HFCausalLM

WRAPPED = ".base_layer."  # what PEFT puts into the names of the layers that it wraps


class LoRACausalLM(HFCausalLM):
    """A language model whose named projections carry low-rank updates; to train these alone: `train: ["decoder.*.lora_*"]`.

    Its state has the names of the plain model beside those of the updates, so that a stage takes over the weights of a stage
    without LoRA: `new: ["decoder.*.lora_*"]`.

    Args:
        rank, alpha, dropout: of the updates; they count alpha / rank.
        targets: last names of the linear layers (XComposer 1: queries, values and the feed-forward).
        settings: of `HFCausalLM`.

    Raises:
        ValueError: if the language model has no layer of these names.
    """

    layouts = ("none until `merge`",)

    def __init__(
        self,
        *,
        rank: int = 64,
        alpha: float = 64.0,
        dropout: float = 0.05,
        targets: Sequence[str] = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        linear = {name.rpartition(".")[2] for name, module in self.lm.named_modules() if isinstance(module, nn.Linear)}
        if unknown := sorted(set(targets) - linear):
            raise ValueError(f"LoRA targets {unknown} are no layers of the decoder; valid choices: {', '.join(sorted(linear))}")
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
        inject_adapter_in_model(config, self.lm)
        self.lm.requires_grad_(True)  # who trains is said by the stage
        self.register_state_dict_post_hook(_plain_names)
        self.register_load_state_dict_pre_hook(_wrapped_names)

    def merge(self) -> None:
        """Add the updates to the weights and leave a plain language model behind, which every layout of its kind can hold."""
        self.layouts = ()
        for name, layer in list(self.lm.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                owner, _, leaf = name.rpartition(".")
                setattr(self.lm.get_submodule(owner), leaf, layer.get_base_layer())


def _plain_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    for name in [n for n in state if n.startswith(prefix) and WRAPPED in n]:
        state[name.replace(WRAPPED, ".")] = state.pop(name)


def _wrapped_names(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    inside = {re.sub(re.escape(WRAPPED), ".", name): name for name, _ in module.named_parameters() if WRAPPED in name}
    for plain, name in inside.items():
        if f"{prefix}{plain}" in state:
            state[f"{prefix}{name}"] = state.pop(f"{prefix}{plain}")
