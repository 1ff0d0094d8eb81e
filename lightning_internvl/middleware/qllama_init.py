"""A QLLaMA grown from a LLaMA, as InternVL 1.0 grew its own from Chinese-LLaMA (Chen et al. 2023,
section 3.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lightning_internvl.hub import load_weights, local_source
from lightning_internvl.layers.basic import fill_with_mean
from lightning_internvl.messages import first_of
from lightning_internvl.middleware.qllama_lm import QLlamaLM

SETTING = "middleware.init_from_llm"
# others with the same tensors scale states or logits by factors of their own
KINDS = ("llama", "mistral")


class Sizes(NamedTuple):
    """What QLLaMA shares with the LLaMA inside it."""

    dim: int
    depth: int
    heads: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float


def sizes_of(given: dict[str, Any], pretrained: str | None) -> Sizes:
    """The sizes that are given, completed from a LLaMA, which must agree with all of them.

    Nothing is read on the meta device where all are given.

    Args:
        given: the fields of `Sizes`; None where open.
        pretrained: see `sources.local_source`; None: there is no LLaMA.

    Raises:
        ValueError: if a size stays open or is another one than the LLaMA's; if the model is none
            that QLLaMA can take in.
    """
    missing = [name for name, value in given.items() if value is None]
    if pretrained is None:
        given = {"rope_theta": 10000.0, "norm_eps": 1e-6} | {k: v for k, v in given.items() if v is not None}
        if missing := [name for name in missing if name not in given]:
            source = f"a LLaMA to take them from ({SETTING}=FOLDER_OR_ID)"
            raise ValueError(f"middleware needs {', '.join(missing)}, or {source}")
        return Sizes(**given)
    if torch.get_default_device().type == "meta" and not missing:
        return Sizes(**given)
    source = local_source(pretrained)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{SETTING}={pretrained} cannot be read: {error}") from error
    if odd := _what_is_odd(config):
        raise ValueError(f"{SETTING}={pretrained}: QLLaMA cannot take in a model with {odd}")
    found = Sizes(
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.intermediate_size, config.rope_parameters["rope_theta"], config.rms_norm_eps,
    )  # fmt: skip
    for name, value in given.items():
        there = getattr(found, name)
        # GGUF files hold float32 numbers
        if value is not None and abs(value - there) > 1e-6 * there:
            other = f"{SETTING}={pretrained} has {name}={there}"
            raise ValueError(f"middleware.{name}={value}, but {other}; leave {name} out")
    return found


def _what_is_odd(config: PretrainedConfig) -> str | None:
    """The first thing in which a language model differs from a LLaMA as QLLaMA computes it."""
    if config.model_type not in KINDS:
        return f"model_type={config.model_type!r} (it reads {', '.join(KINDS)})"
    kind = config.rope_parameters.get("rope_type", "default")
    wanted = config.hidden_size // config.num_attention_heads
    for name, value, fitting in (
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_type", kind, "default"),
        ("head_dim", getattr(config, "head_dim", None) or wanted, wanted),
    ):
        if value != fitting:
            return f"{name}={value!r} (it computes {fitting!r})"
    return None


@torch.no_grad()
def start_from_llama(lm: QLlamaLM, pretrained: str) -> None:
    """Copy a LLaMA's weights; cross-attention keeps its own start. Does nothing on the meta device.

    Keys and values that heads share are repeated for each head, which computes the same. A head
    tied to the token table becomes a copy of it. Words that only QLLaMA has start as the mean of
    the others.

    Args:
        pretrained: see `sources.local_source`.

    Raises:
        ValueError: if the checkpoint cannot be loaded or has tensors for which QLLaMA has no place.
    """
    if lm.model.embed_tokens.weight.is_meta:
        return
    found = load_weights(AutoModelForCausalLM, pretrained, SETTING, dtype="auto")
    own, theirs = {n: t for n, t in lm.state_dict().items() if ".cross_attn." not in n}, found.state_dict()
    if left := [name for name in theirs if name not in own and name != "lm_head.weight"]:
        fault = f"tensors that QLLaMA has no place for: {first_of(left)}"
        raise ValueError(f"{SETTING}={pretrained} has {fault}")
    for name, here in own.items():
        there = theirs[name]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            there = _for_each_head(there, found.config)
        rows = min(len(here), len(there))
        here[:rows] = there[:rows]
        if rows < len(here):
            fill_with_mean(here, rows)


def _for_each_head(weight: Tensor, config: Any) -> Tensor:
    """Rows of keys or values (groups * K, M), repeated for each head: (heads * K, M)."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return weight.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0).flatten(0, 1)
