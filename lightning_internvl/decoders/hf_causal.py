"""Any Hugging Face causal language model as the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


class HFCausalLM(nn.Module):
    """A language model that writes the answer; its parameters keep their Hugging Face names below `lm.`.

    Args:
        pretrained: a hub id or a local folder; its weights are loaded. None builds from `config` with random weights.
        config: fields of the model's configuration, `model_type` among them (toy models and overrides).
        vocab_size: rows of the embedding table (completed from the tokenizer); a pretrained table is grown to it.
        embed_std: deviation of the initial token embeddings of a model built from `config`; None: that of `config`.

    On the meta device no weights are loaded.
    """

    configs: Any = AutoConfig  # makes and reads configurations; a subclass may choose another
    models: Any = AutoModelForCausalLM  # makes models of them

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        embed_std: float | None = None,
    ) -> None:
        super().__init__()
        if pretrained is None and not config:
            raise ValueError("the decoder needs either `pretrained` (a hub id or a folder) or `config` (with model_type)")
        shapes_only = torch.get_default_device().type == "meta"
        if pretrained is None:
            fields = {k: v for k, v in config.items() if k != "model_type"}
            fields = fields if vocab_size is None else fields | {"vocab_size": vocab_size}
            self.lm = self.models.from_config(self.configs.for_model(config["model_type"], **fields))
            if embed_std is not None:
                nn.init.normal_(self.lm.get_input_embeddings().weight, std=embed_std)
        elif shapes_only:
            self.lm = self.models.from_config(self.configs.from_pretrained(pretrained, **(config or {})))
        else:
            self.lm = self.models.from_pretrained(pretrained, **(config or {}))
        if pretrained is not None and vocab_size and vocab_size > self.lm.get_input_embeddings().num_embeddings:
            self.lm.resize_token_embeddings(vocab_size, mean_resizing=not shapes_only)
        self.dim: int = self.lm.get_input_embeddings().embedding_dim

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one: the blocks of the longest module list."""
        lists = [m for m in self.lm.modules() if isinstance(m, nn.ModuleList)]
        return list(max(lists, key=len)) if lists else [self.lm]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.lm.get_input_embeddings().num_embeddings

    @property
    def tied(self) -> bool:
        """Whether output and input embeddings are one tensor."""
        return bool(self.lm.config.tie_word_embeddings)

    def tie(self) -> None:
        """Let tied embeddings share one tensor again after one of them was replaced."""
        if self.tied:
            self.lm.get_output_embeddings().weight = self.lm.get_input_embeddings().weight

    def embed(self, ids_BL: Tensor) -> Tensor:
        """(B, L) -> (B, L, H)"""
        return self.lm.get_input_embeddings()(ids_BL)

    def hidden(self, embeds_BLH: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H)."""
        if embeds_BLH.is_meta:  # transformers would look into a mask of two dimensions; one of four it takes as it is
            length = attention_mask_BL.shape[1]
            attention_mask_BL = attention_mask_BL.bool()[:, None, None].expand(-1, 1, length, length)
        options: dict[str, Any] = {"attention_mask": attention_mask_BL, "use_cache": False}
        if embeds_BLH.is_meta and self.lm.config.model_type == "opt":  # it counts positions in a mask of two dimensions
            places = torch.arange(embeds_BLH.shape[1], device=embeds_BLH.device)
            options["position_ids"] = places.expand(len(embeds_BLH), -1)
        return self.lm.base_model(inputs_embeds=embeds_BLH, **options)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any states: (..., H) -> (..., V), float32."""
        return self.lm.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded prompts given as embeddings; options as in transformers."""
        return self.lm.generate(inputs_embeds=embeds_BLH, attention_mask=attention_mask_BL, **options)
