"""Which tensors a GGUF file of llama.cpp has, made of which tensors of an exported folder.

Names are those of the tables of the package gguf; what is permuted, cut or stacked, and which types
are kept, is as in llama.cpp's converters (conversion/llama.py, internlm.py, phi.py, gemma.py, qwen.py,
qwenvl.py, intern_vision.py, base.py `prepare_tensors`; for LLaVA's CLIP convert_image_encoder_to_gguf.py). Letters: H heads, D
channels of one, I inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.checkpoints.name_rules import Config

Change = Callable[..., Tensor]
# The class of a language model, and what llama.cpp calls its architecture.
LANGUAGES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "InternLM2ForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen2VLForConditionalGeneration": "qwen2vl", "Qwen2_5_VLForConditionalGeneration": "qwen2vl",
    "Phi3ForCausalLM": "phi3", "Gemma3ForCausalLM": "gemma3",
}  # fmt: skip
ROPE_FREQS = "rope_freqs.weight"
# How the names of a language model begin, InternLM2's among them.
_BEGIN = (
    "model.layers.", "model.embed_tokens.", "model.tok_embeddings.", "model.norm.", "lm_head.", "output.",
)  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file: its name, the tensors of the folder that it is made of, and how."""

    name: str
    sources: tuple[str, ...]
    change: Change = lambda tensor: tensor
    forced: str | None = None  # the type that it has whatever the others have


def table(architecture: str, blocks: int) -> Any:
    """The names of an architecture by those of the Hugging Face layouts."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], blocks)


def named(names: Any, official: str) -> str:
    """The name in a table; raises ValueError where it has none."""
    found = names.get_name(official, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"GGUF has no name for the tensor {official}")
    return found


# --- the language model ---------------------------------------------------------------------------


def language_tensors(text: Config, names: Iterable[str]) -> Iterator[GGUFTensor]:
    """The tensors of the language model.

    Args:
        text: its config.
        names: of all tensors in the folder.
    """
    architecture = LANGUAGES[text["architectures"][0]]
    known = table(architecture, text["num_hidden_layers"])
    heads = text["num_attention_heads"]
    key_heads = text.get("num_key_value_heads") or heads
    experts: dict[tuple[str, str], list[str]] = {}
    for name in names:
        inner = name.replace("language_model.", "", 1)
        if not inner.startswith(_BEGIN) or (architecture == "gemma3" and inner.startswith("lm_head.")):
            continue
        if found := re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(\w+)\.weight", inner):
            experts.setdefault((found[1], found[2]), []).append(name)
            continue
        if ".attention.wqkv." in inner:
            for side in "qkv":
                unfused = inner.replace("attention.wqkv", f"self_attn.{side}_proj")
                yield GGUFTensor(named(known, unfused), (name,), _unfused(side, heads, key_heads))
            continue
        change: Change = _one_more if architecture == "gemma3" and inner.endswith("norm.weight") else _same
        if architecture == "llama" and (turned := re.search(r"\.self_attn\.([qk])_proj\.", inner)):
            change = _interleaved(heads if turned[1] == "q" else key_heads)
        yield GGUFTensor(named(known, inner), (name,), change)
    for (layer, part), parts in experts.items():
        stacked = sorted(parts, key=lambda name: int(name.split(".experts.")[1].partition(".")[0]))
        yield GGUFTensor(named(known, f"{layer}.{part}.weight"), tuple(stacked), _stack)
    if (factors := llama3_factors(text)) is not None:
        yield GGUFTensor(ROPE_FREQS, (), lambda: factors)
    for length in ("long", "short") if rope_of(text)["rope_type"] == "longrope" else ():
        longrope = torch.tensor(rope_of(text)[f"{length}_factor"])
        yield GGUFTensor(f"rope_factors_{length}.weight", (), lambda found=longrope: found)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _one_more(tensor: Tensor) -> Tensor:
    """The scales of a norm that the files of Gemma have less 1."""
    return tensor.float() + 1


def _unfused(side: str, heads: int, key_heads: int) -> Change:
    """Queries, keys or values of InternLM2's matrix, which has for each key head its queries, itself
    and its value; turned as those of a LLaMA."""

    def take(rows: Tensor) -> Tensor:
        grouped = rows.reshape(key_heads, heads // key_heads + 2, -1, *rows.shape[1:])
        place = {"q": slice(None, -2), "k": slice(-2, -1), "v": slice(-1, None)}[side]
        own = grouped[:, place].reshape(-1, *rows.shape[1:])
        return own if side == "v" else _interleaved(heads if side == "q" else key_heads)(own)

    return take


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)


def _interleaved(heads: int) -> Change:
    """Rows (H x D, I) of a query or key whose two halves are turned together, as pairs of neighbours,
    which llama.cpp turns."""
    return lambda rows: rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rope_of(text: Config) -> Config:
    """What a config says of positions, in the fields of transformers 5 or in the older ones."""
    parameters: Config = text.get("rope_parameters") or {}
    rope: Config = {**(text.get("rope_scaling") or {}), **parameters.get("full_attention", parameters)}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    theta = rope.get("rope_theta", text.get("rope_theta", 10000.0))
    return {**rope, "rope_type": {"mrope": "default", "su": "longrope"}.get(kind, kind), "rope_theta": theta}


def llama3_factors(text: Config) -> Tensor | None:
    """By what Llama 3.1 divides the frequencies of its positions, (D / 2,); None for other models
    (`_compute_llama3_parameters` of transformers)."""
    rope = rope_of(text)
    if rope["rope_type"] != "llama3":
        return None
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    length, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((length / waves - low) / (high - low)).clamp(0, 1)  # 0: divided whole; 1: left as it is
    return (1 / ((1 - share) / rope["factor"] + share)).float()


# --- tower and projector --------------------------------------------------------------------------


def vision_tensors(config: Config, names: Sequence[str], blocks: int) -> Iterator[GGUFTensor]:
    """The tensors of the tower and of what hands its tokens on.

    Args:
        config: the `config.json` of the folder, of a kind that `gguf_fields.KINDS` has.
        blocks: of the tower that are read; later ones are left out.
    """
    kind = config["model_type"]
    known = table("clip", max(blocks, 4))  # it numbers the layers of projectors too
    qwen = {"qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_vl}
    make = {"llava": _llava, "internvl": _internvl, "internvl_chat": _internvl_chat, **qwen}[kind]
    for name in names:
        found = re.search(r"\.(?:layers?|blocks)\.(\d+)\.", name)
        if found and int(found[1]) >= blocks and "language_model" not in name:
            continue
        yield from make(known, name)


def _llava(known: Any, name: str) -> Iterator[GGUFTensor]:
    if name.startswith("multi_modal_projector."):  # the reader's names are those of LLaVA's own layout
        yield GGUFTensor(
            name.replace("multi_modal_projector.linear_1", "mm.0").replace("multi_modal_projector.linear_2", "mm.2"), (name,)
        )
    elif name.startswith("vision_tower.") and ".post_layernorm." not in name:  # the reader would use it
        yield _tower_tensor(named(known, name), name)


def _internvl(known: Any, name: str) -> Iterator[GGUFTensor]:
    projector = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
    if found := re.fullmatch(r"multi_modal_projector\.(\w+)\.(weight|bias)", name):
        yield GGUFTensor(named(known, f"{projector[found[1]]}.{found[2]}"), (name,))
    elif name.startswith("vision_tower."):
        yield _tower_tensor(named(known, f"model.{_with_leaf(name)}"), name)


def _internvl_chat(known: Any, name: str) -> Iterator[GGUFTensor]:
    if name.startswith("mlp1."):
        yield GGUFTensor(named(known, name), (name,))
    elif name.startswith("vision_model."):
        official = f"vision_tower.{_with_leaf(name)}"
        if ".attn.qkv." not in official:
            yield _tower_tensor(named(known, official), name)
            return
        for place, side in enumerate("qkv"):
            yield GGUFTensor(named(known, official.replace("attn.qkv", f"self_attn.{side}_proj")), (name,), _third(place))


def _qwen2_vl(known: Any, name: str) -> Iterator[GGUFTensor]:
    if not name.startswith("visual."):
        return
    if ".qkv." in name:
        for place, side in enumerate("qkv"):
            yield GGUFTensor(named(known, name.replace("qkv", side)), (name,), _third(place))
    elif name == "visual.patch_embed.proj.weight":  # two frames: a convolution each
        target = named(known, name)
        yield _tower_tensor(target, name, lambda kernel: kernel[:, :, 0])
        yield _tower_tensor(f"{target}.1", name, lambda kernel: kernel[:, :, 1])
    else:
        yield _tower_tensor(named(known, name), name)


def _tower_tensor(target: str, name: str, change: Change = _same) -> GGUFTensor:
    forced = "patch" if ".patch_embd.weight" in target else "F32" if ".position_embd." in target else None
    return GGUFTensor(target, (name,), change, forced)


def _third(place: int) -> Change:
    return lambda tensor: tensor.chunk(3)[place]


def _with_leaf(name: str) -> str:
    """InternViT's scales and positions as the others are named."""
    bare = name.endswith((".ls1", ".ls2", ".lambda_1", ".lambda_2", "position_embedding", "position_embeddings"))
    return f"{name}.weight" if bare else name


def type_of(tensor: GGUFTensor, dimensions: int, usual: str) -> str:
    """The type of a tensor in a file whose matrices are of the type `usual`: vectors, norms and
    positions stay in 32 bits, the kernel of a convolution is never bfloat16."""
    if tensor.forced == "patch":
        return "F16" if usual == "F16" else "F32"
    small = dimensions <= 1 or tensor.name.endswith("_norm.weight") or not tensor.name.endswith(".weight")
    router = tensor.name.endswith(".ffn_gate_inp.weight")
    return tensor.forced or ("F32" if small or router else usual)
