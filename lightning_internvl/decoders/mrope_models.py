"""Language models of transformers whose positions are time, row and column, with their output
embeddings: `model.*` and `lm_head`, as the official files name them below `language_model`.

Letters: B rows, L text length, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel, Qwen2VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel, Qwen3VLTextModel
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoePreTrainedModel, Qwen3VLMoeTextModel

from lightning_internvl.hub import model_type


class _Writes:
    """Output embeddings on a text model."""

    input_modalities: Any = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers reads it from the class
    model: nn.Module
    lm_head: nn.Linear
    post_init: Any  # of transformers' models
    _from_config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """For generation: logits (B, L or `logits_to_keep`, V); `position_ids` are (3, B, L)."""
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.lm_head(read.last_hidden_state[:, -logits_to_keep if logits_to_keep else 0 :])
        return CausalLMOutputWithPast(logits=logits, past_key_values=read.past_key_values)

    @classmethod
    def from_config(cls, config: Any, trust_remote_code: bool = False) -> Any:
        """A model with fresh weights."""
        return cls._from_config(config)

    def _complete(self, config: Any, model: nn.Module) -> None:
        self.model = model
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MRopeLM(_Writes, Qwen2VLPreTrainedModel, GenerationMixin):
    """The text model of Qwen2-VL and Qwen2.5-VL."""

    config_class = Qwen2VLTextConfig

    def __init__(self, config: Qwen2VLTextConfig) -> None:
        super().__init__(config)
        self._complete(config, Qwen2VLTextModel(config))


class Qwen3MRopeLM(_Writes, Qwen3VLPreTrainedModel, GenerationMixin):
    """The text model of Qwen3-VL."""

    config_class = Qwen3VLTextConfig

    def __init__(self, config: Qwen3VLTextConfig) -> None:
        super().__init__(config)
        self._complete(config, Qwen3VLTextModel(config))


class Qwen3MoeMRopeLM(_Writes, Qwen3VLMoePreTrainedModel, GenerationMixin):
    """The text model of Qwen3-VL with a mixture of experts."""

    config_class = Qwen3VLMoeTextConfig

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__(config)
        self._complete(config, Qwen3VLMoeTextModel(config))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Experts may be computed in one product; transformers would look for this in this file."""
        return True


class _Kind(NamedTuple):
    """Configuration and model, and how many frequencies turn with time, row and column where a
    configuration does not say it."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    section: tuple[int, int, int]


_QWEN2 = _Kind(Qwen2VLTextConfig, MRopeLM, (16, 24, 24))
_QWEN3 = _Kind(Qwen3VLTextConfig, Qwen3MRopeLM, (24, 20, 20))
_QWEN3_MOE = _Kind(Qwen3VLMoeTextConfig, Qwen3MoeMRopeLM, (24, 20, 20))
KINDS = {
    "qwen2": _QWEN2, "qwen2_vl_text": _QWEN2, "qwen2_5_vl_text": _QWEN2,
    "qwen3": _QWEN3, "qwen3_vl_text": _QWEN3, "qwen3_moe": _QWEN3_MOE, "qwen3_vl_moe_text": _QWEN3_MOE,
}  # fmt: skip


def kind_of(pretrained: str | None, config: Mapping[str, Any]) -> _Kind:
    """The kind of a language model, as its fields say it or the folder or id that it is read from.

    Raises:
        ValueError: for one that has no such positions.
    """
    name = config.get("model_type")
    if name is None and pretrained is not None:
        name = model_type(pretrained, "decoder.pretrained")
    if name is not None and name not in KINDS:
        raise ValueError(f"decoder.config.model_type={name!r} has no M-RoPE; valid choices: {', '.join(KINDS)}")
    return KINDS.get(name or "", _QWEN2)


class MRopeConfigs:
    """Configurations of a kind, but for rotary positions those of plain Qwen2 and Qwen3."""

    def __init__(self, kind: _Kind) -> None:
        self.kind, self.from_pretrained = kind, kind.config.from_pretrained

    def for_model(self, name: str, **fields: Any) -> PreTrainedConfig:
        """A configuration of its fields."""
        return self.kind.config(**fields)


def check_section(config: Any) -> None:
    """Refuse frequencies that do not fill a head.

    Raises:
        ValueError: with the number that there must be.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    usual = next(kind.section for kind in KINDS.values() if kind.config is type(config))
    section = config.rope_parameters.get("mrope_section", usual)
    if len(section) != 3 or sum(section) != width // 2:
        needs = f"three numbers with the sum {width // 2}, half the width of a head"
        raise ValueError(f"mrope_section={list(section)} must be {needs}")
