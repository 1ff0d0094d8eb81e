"""Pretrained language models from GGUF files, from packages and from folders."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_internvl import hub as sources
from lightning_internvl.data.tokenizer import hf_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.hub import local_source
from lightning_internvl.messages import SMOLLM2

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij", "Ġ", "ab"]
CONFIG = {
    "vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}  # fmt: skip


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """A tiny LLaMA with a byte-level tokenizer, as llama.cpp writes them."""
    gguf = pytest.importorskip("gguf", reason=f"reading GGUF files needs the package gguf ({SMOLLM2})")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for here, there in NAMES.items():
            name = name.replace(here, there)
        array = tensor.numpy()
        if "attn_q" in name or "attn_k" in name:  # rotary pairs stand side by side there
            array = array.reshape(-1, 2, 8, 64).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(sources, "HF_HOME", str(tmp_path / "cache"))
    sources._unpacked.cache_clear()
    return tmp_path / "cache" / "lightning_internvl"


def test_a_gguf_file_gives_model_and_tokenizer_and_is_read_once(
    model: LlamaForCausalLM, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)
    with torch.device("meta"):  # the rehearsal of a run asks first
        tokenizer = hf_tokenizer(str(file))
    decoder = HFCausalLM(pretrained=str(file), vocab_size=len(tokenizer))
    assert [path.name.rpartition("-")[0] for path in cache.iterdir()] == ["tiny"]
    assert tokenizer.convert_ids_to_tokens([1, 2, 14]) == ["<|im_start|>", "<|im_end|>", "ab"]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", len(WORDS) + 7)
    theirs = model.state_dict()
    assert decoder.lm.model.layers[1].self_attn.k_proj.weight.equal(theirs["model.layers.1.self_attn.k_proj.weight"])
    assert decoder.embed(torch.tensor([4]))[0].equal(theirs["model.embed_tokens.weight"][4])
    assert decoder.tied
    for gone in ("_unpack", "file_of_package"):
        monkeypatch.setattr(sources, gone, None)
    sources._unpacked.cache_clear()  # as another process
    assert HFCausalLM(pretrained=str(file)).vocab_size == len(WORDS)


def test_the_gguf_file_of_a_package_is_found_without_running_the_package(
    model: LlamaForCausalLM, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tiny_words"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"must hold one \.gguf file, it holds 0"):
        local_source("package:tiny_words")
    write_gguf(package / "tiny.gguf", model)
    folder = Path(local_source("package:tiny_words"))
    assert folder.parent == cache
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 64


def test_hub_ids_and_folders_stay(tmp_path: Path) -> None:
    assert local_source("owner/name") == "owner/name"
    assert local_source(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("word", ["nothing_here", "not a name", "a.b"])
def test_a_missing_package_is_answered_with_the_line_that_installs_it(word: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no package {word!r}.*{SMOLLM2}"):
        local_source(f"package:{word}")


@pytest.mark.parametrize("word", ["/nothing/here", "some/where/else", "words.gguf"])
def test_a_missing_folder_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=f"{word}: there is no such folder or GGUF file"):
        HFCausalLM(pretrained=word)


def test_the_reader_of_gguf_files_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"package gguf .* is not installed: *{SMOLLM2}"):
        local_source(str(tmp_path / "some.gguf"))
