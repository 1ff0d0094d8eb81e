"""Any Hugging Face causal language model as the decoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_internvl.decoders.hf_norms import fuse_norms
from lightning_internvl.hub import check_no_kernels, load_weights, model_source, own_attention, plain_config
from lightning_internvl.layers.attention import requested_backend
from lightning_internvl.layers.attention_masks import Segments
from lightning_internvl.layers.basic import fill_with_mean, lowered
from lightning_internvl.layers.hf_attention import packed_inputs, right_padded_inputs, use_ours
from lightning_internvl.layers.hf_config import make_config
from lightning_internvl.protocols import Part, TensorPlan


class HFCausalLM(Part):
    """A language model that writes the answer; parameters keep their names below `lm.`.

    It reads packed rows: `segments` are the lengths of the samples of each row, which see
    themselves alone.

    Args:
        pretrained: a hub id, a local folder, a GGUF file or `package:NAME` (see
            `sources.local_source`); its weights are loaded. None builds from `config` with random
            weights.
        config: fields of the model's configuration, `model_type` among them (toy models and
            overrides). With `tie_word_embeddings: false` a file's one table becomes two.
        vocab_size: rows of the embedding table (completed from the tokenizer); a pretrained table
            is grown to it, and its new rows start as the mean of the old ones.
        vocab_multiple: a pretrained table that grows gets rows up to a multiple of this.
        embed_std: deviation of the initial token embeddings of a model built from `config`; None:
            that of `config`.
        keys_start_as_queries: keys of a model built from `config` start with the weights of the
            queries, so that a token attends to what is like it from the first step. Language models
            that are trained have such heads; from random weights it takes most of a toy's training
            to find them.

    On the meta device no weights are loaded, and nothing at all is read where `config` has a
    `model_type`.

    Raises:
        ValueError: without `pretrained` and `config`; if what `pretrained` names cannot be loaded
            with this `config`; for a `config` that asks for a router's loss.
    """

    inputs: tuple[str, ...] = ("segments", "right_padded")
    # what the families of transformers call it
    roles: ClassVar = {
        "word_table": ("*.embed_tokens", "*.wte", "*.word_embeddings", "*.embed_in", "*.tok_embeddings", "*.shared"),
        "language_head": ("*.lm_head", "*.embed_out", "lm.output"),
    }
    feeds_blocks = True  # a middleware may add to what they make of visual tokens
    configs: Any = AutoConfig  # makes and reads configurations; a subclass may choose another
    models: Any = AutoModelForCausalLM  # makes models of them

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        vocab_multiple: int = 1,
        embed_std: float | None = None,
        keys_start_as_queries: bool = False,
    ) -> None:
        super().__init__()
        config = config or {}
        if pretrained is None and not config:
            either = "`pretrained` (a hub id or a folder) or `config` (with model_type)"
            raise ValueError(f"the decoder needs either {either}")
        check_no_kernels(config or {}, "decoder.config")
        if config.get("output_router_logits"):
            instead = "a loss that balances routers is a setting of the stage: stages.NAME.module.router_balance=0.001"
            raise ValueError(f"decoder.config.output_router_logits=true has no effect: {instead}; leave it out")
        if pretrained is None:
            rows = {} if vocab_size is None else {"vocab_size": vocab_size}
            self.lm = self._fresh({**config, **rows})
            if embed_std is not None:
                nn.init.normal_(self.lm.get_input_embeddings().weight, std=embed_std)
            if keys_start_as_queries:
                start_keys_as_queries(self.lm)
        else:
            self.lm = self._loaded(pretrained, config)
            if vocab_size and vocab_size > self.vocab_size:
                self.grow(vocab_size, vocab_multiple)
        if hasattr(self.lm.config, "output_router_logits"):  # a folder may ask for what nothing reads
            self.lm.config.output_router_logits = False
        self.dim: int = self.lm.get_input_embeddings().embedding_dim
        fuse_norms(self.lm)
        # a plan keeps the scores of one that computes in no other way (GPT-OSS)
        plain = self.lm.device.type == "meta" and not self.lm._supports_sdpa
        if requested_backend() != "auto" and not plain:
            use_ours(self.lm)

    def _fresh(self, config: dict[str, Any]) -> Any:
        # transformers writes into the rotary parameters
        made = make_config(self.configs, copy.deepcopy(config | known_rope(config)), "decoder.config")
        return self.models.from_config(made, trust_remote_code=False)

    def _loaded(self, pretrained: str, config: dict[str, Any]) -> Any:
        shapes_only = torch.get_default_device().type == "meta"
        if shapes_only and "model_type" in config:
            return self._fresh(config)
        if shapes_only:
            fields = {**own_attention(config), "trust_remote_code": False}
            found = self.configs.from_pretrained(model_source(pretrained, "decoder.pretrained"), **fields)
            return self.models.from_config(found, trust_remote_code=False)
        apart = config.get("tie_word_embeddings") is False  # of a file that holds one table, both start as it
        options = {name: value for name, value in config.items() if name != "tie_word_embeddings" or not apart}
        model = load_weights(self.models, pretrained, "decoder.pretrained", **options)
        if apart:
            untie(model)
        return model

    def grow(self, rows: int, multiple: int = 1) -> None:
        """More rows in the tables of words, tied or not. transformers would draw them around the
        mean; the mean needs no luck."""
        known = self.vocab_size
        self.lm.resize_token_embeddings(rows, pad_to_multiple_of=multiple, mean_resizing=False)
        tables = [self.lm.get_input_embeddings(), self.lm.get_output_embeddings()]
        for tensor in {t: None for table in tables for t in table.parameters(recurse=False)}:
            fill_with_mean(tensor, known)

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one: the blocks of the longest module list."""
        lists = [m for m in self.lm.modules() if isinstance(m, nn.ModuleList)]
        return [*max(lists, key=len)] if lists else [self.lm]

    def tensor_plan(self) -> TensorPlan | None:
        """Layers that tensor parallelism divides, where transformers says so for blocks of LLaMA's
        kind. A norm of single heads (qwen3) would need gradients of all shares, and what a subclass
        adds to a block is not known here: neither is divided."""
        ways, config = getattr(self.lm.config, "base_model_tp_plan", None) or {}, self.lm.config
        if type(self) is not HFCausalLM or not ways or set(ways.values()) != {"colwise", "rowwise"}:
            return None
        start = f"lm.{self.lm.base_model_prefix}"
        names = {w: tuple(f"{start}.{n}" for n in ways if ways[n] == w) for w in ways.values()}
        kinds = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        counts = {kind: getattr(config, kind) for kind in kinds}
        return TensorPlan(names["colwise"], names["rowwise"], counts)

    def routers(self) -> list[nn.Module]:
        """What sends tokens to experts, a module for each block that has some; its first output are the
        logits (tokens, experts)."""
        recorded = getattr(self.lm.base_model, "_can_record_outputs", None) or {}
        kind = getattr(recorded.get("router_logits"), "target_class", None)
        return [] if kind is None else [module for module in self.lm.modules() if isinstance(module, kind)]

    @property
    def experts_of_a_token(self) -> int:
        """How many experts a token goes to; 0 without experts."""
        return int(self.lm.config.num_experts_per_tok) if self.routers() else 0

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.lm.get_input_embeddings().num_embeddings

    @property
    def plain_config(self) -> dict[str, Any]:
        """The `config` of the same architecture, in plain values, `model_type` among them;
        transformers writes it like this."""
        return plain_config(self.lm.config)

    @property
    def without_source(self) -> dict[str, Any]:
        """Settings instead of those given, to build the same without reading a checkpoint."""
        return {"pretrained": None, "config": self.plain_config, "vocab_size": self.vocab_size}

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

    def hidden(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        *,
        segments: Segments | None = None,
        right_padded: bool = False,
    ) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H). In mixed precision they are in the
        lower type from the first block on.

        Args:
            segments: for each row the lengths of its samples in order, where rows are packed; what
                is left of a row is padding.
            right_padded: whether padding stands behind the tokens of a row and nowhere else.

        Raises:
            ValueError: for segments that do not fit the rows, or a language model that cannot keep
                samples apart.
        """
        inputs = self.row_inputs(attention_mask_BL, segments, right_padded)
        return self.lm.base_model(inputs_embeds=lowered(embeds_BLH), use_cache=False, **inputs)[0]

    def row_inputs(self, attention_mask_BL: Tensor, segments: Segments | None, right_padded: bool) -> dict[str, Any]:
        """What the language model is told of rows beside their embeddings; arguments and errors as of
        `hidden`."""
        if segments is not None:
            return packed_inputs(self.lm, segments, attention_mask_BL)
        if attention_mask_BL.is_meta:
            # transformers would look into a mask of two dimensions; one of four it takes as it is
            rows, length = attention_mask_BL.shape
            inputs = {"attention_mask": attention_mask_BL.bool()[:, None, None].expand(-1, 1, length, length)}
            if self.lm.config.model_type == "opt":  # it counts positions in a mask of two dimensions
                inputs["position_ids"] = torch.arange(length, device=attention_mask_BL.device).expand(rows, -1)
            return inputs
        return right_padded_inputs(self.lm, attention_mask_BL) if right_padded else {"attention_mask": attention_mask_BL}

    @property
    def output_layer(self) -> nn.Module:
        """All that `head` calls."""
        return self.lm.get_output_embeddings()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any states: (..., H) -> (..., V), float32."""
        return self.output_layer(hidden).float()

    @torch.no_grad()
    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded embeddings; options of transformers."""
        return self.lm.generate(inputs_embeds=embeds_BLH, attention_mask=attention_mask_BL, **options)


def start_keys_as_queries(model: nn.Module) -> None:
    """Copies the weights of queries to keys in each attention of a model. Raises ValueError where
    it has none of `q_proj` and `k_proj` of one shape."""
    pairs = [(m.q_proj.weight, m.k_proj.weight) for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
    if not pairs or any(query.shape != key.shape for query, key in pairs):
        needs = "attention layers with q_proj and k_proj of one shape (as many key as query heads)"
        raise ValueError(f"decoder.keys_start_as_queries=true needs {needs}; this model has none, or others")
    with torch.no_grad():
        for query, key in pairs:
            key.copy_(query)


def untie(model: Any) -> None:
    """Gives the output layer of a model of transformers a table of its own, equal to that of the
    words, where it shares theirs."""
    head = model.get_output_embeddings()
    model.config.tie_word_embeddings = False
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()  # none, by which files are written


def known_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Scaled positions as transformers names them, where a config has the first name of LongRoPE
    (`su`, in Phi-3 files of early 2024)."""
    rope = config.get("rope_scaling") or {}
    kinds = {key: "longrope" for key in ("type", "rope_type") if rope.get(key) == "su"}
    return {"rope_scaling": {**rope, **kinds}} if kinds else {}
