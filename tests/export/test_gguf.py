"""GGUF files of finished runs: read back by the package gguf, named by its tables, with the fields that llama.cpp reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_internvl.config.targets import build
from lightning_internvl.export import check
from lightning_internvl.export.gguf_export import export_gguf
from lightning_internvl.export.gguf_fields import gguf_faults
from lightning_internvl.export.gguf_files import projector_file, write_gguf
from lightning_internvl.export.gguf_tensors import llama3_factors, table
from lightning_internvl.export.gguf_words import NO_MERGES, UNKNOWN_SPLIT, write_words
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.inference.load_run import open_run

gguf = pytest.importorskip("gguf", reason="needs requirements-gguf.txt")
MakeRun = Callable[..., Path]
Exported = Callable[..., tuple[Path, ExportReport]]
# Architecture, and from a tensor of the folder to its name in a file, as the tables have it.
RUNS = {
    "llava_toy": ("float32", "llama", {"vision_tower.vision_model.embeddings.class_embedding": "v.class_embd"}),
    "internvl_1_5_toy": ("bfloat16", "llama", {"vision_tower.encoder.layer.0.lambda_1": "v.blk.0.ls1.weight"}),
    "qwen2_vl_toy": ("float16", "qwen2vl", {"visual.merger.ln_q.weight": "v.post_ln.weight"}),
    "qwen2_5_vl_toy": ("float16", "qwen2vl", {"visual.blocks.1.mlp.gate_proj.weight": "v.blk.1.ffn_gate.weight"}),
}
# What llama.cpp takes of windows: one size of them, and a layer that sees all after every so many.
WINDOWS = ("encoder.window=112", "encoder.full_layers=[1]")


def values(tensor: Any) -> np.ndarray:
    """Numbers of a tensor of a file."""
    raw = np.ascontiguousarray(tensor.data)
    if tensor.tensor_type.name == "BF16":
        bits = raw.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape([int(n) for n in reversed(tensor.shape)])
    return raw.astype(np.float32)


@pytest.mark.parametrize("recipe", RUNS)
def test_tensors_read_back_equal_under_the_names_of_the_tables(exported: Exported, tmp_path: Path, recipe: str) -> None:
    dtype, architecture, known = RUNS[recipe]
    folder, _ = exported(recipe, *(WINDOWS if recipe == "qwen2_5_vl_toy" else ()), dtype=dtype)
    to = tmp_path / "m.gguf"
    lines, notes = write_gguf(folder, to, ExportOptions(dtype=dtype))
    assert [line.partition(" tensors ")[2] for line in lines] == ["read back equal"] * 2
    assert UNKNOWN_SPLIT in notes  # of the tokenizer of toys
    official = load_file(folder / "model.safetensors")
    text, tower = gguf.GGUFReader(to), gguf.GGUFReader(projector_file(to))
    found = {tensor.name: tensor for tensor in [*text.tensors, *tower.tensors]}
    assert text.fields["tokenizer.ggml.merges"].contents() == NO_MERGES  # llama.cpp asks for some
    names, known = table(architecture, 8), dict(known)
    for name in official:
        inner = name.replace("language_model.", "", 1)
        turned = architecture == "llama" and (".q_proj." in inner or ".k_proj." in inner)
        if (target := names.get_name(inner, try_suffixes=(".weight", ".bias"))) and not turned:
            known[name] = target
    assert len(known) > 10
    for name, target in known.items():
        assert np.array_equal(values(found[target]).ravel(), official[name].float().numpy().ravel()), name
    assert text.fields["general.architecture"].contents() == architecture
    assert tower.fields["general.architecture"].contents() == "clip"
    matrices = {tensor.tensor_type.name for tensor in text.tensors if len(tensor.shape) == 2}
    assert matrices == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert {tensor.tensor_type.name for tensor in text.tensors if len(tensor.shape) == 1} == {"F32"}
    tokens = text.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == found["token_embd.weight"].shape[1] == len(text.fields["tokenizer.ggml.token_type"].contents())
    assert text.fields["tokenizer.ggml.eos_token_id"].contents() == tokens.index("</s>")
    assert text.fields["tokenizer.chat_template"].contents() == (folder / "chat_template.jinja").read_text()


def test_queries_and_keys_of_a_llama_have_neighbouring_pairs(exported: Exported, tmp_path: Path) -> None:
    """Row 2i of a head is row i of its first half, row 2i + 1 that of its second."""
    folder, _ = exported("llava_toy", dtype="float32")
    write_gguf(folder, tmp_path / "m.gguf", ExportOptions())
    text = json.loads((folder / "config.json").read_text())["text_config"]
    held = {tensor.name: values(tensor) for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    rows = load_file(folder / "model.safetensors")["language_model.model.layers.0.self_attn.q_proj.weight"].numpy()
    size = text["hidden_size"] // text["num_attention_heads"]
    for head in range(text["num_attention_heads"]):
        ours, theirs = (matrix[head * size : (head + 1) * size] for matrix in (held["blk.0.attn_q.weight"], rows))
        assert np.array_equal(ours[0::2], theirs[: size // 2])
        assert np.array_equal(ours[1::2], theirs[size // 2 :])


def test_both_layouts_of_internvl_are_the_same_files(make_run: MakeRun, tmp_path: Path) -> None:
    opened = open_run(make_run("internvl_1_5_toy", "data.chats_collate.template=chatml"), build)
    held = []
    for layout in ("internvl_native", "internvl_chat"):
        to = tmp_path / layout / "m.gguf"
        report = export_gguf(opened, to, ExportOptions(layout=layout))
        assert sorted(path.name for path in to.parent.iterdir()) == ["m.gguf", "mmproj-m.gguf"]
        assert any("llama.cpp takes rms_norm at 3200 and 45 alone" in note for note in report.notes)
        held.append([{t.name: values(t) for t in gguf.GGUFReader(file).tensors} for file in (to, projector_file(to))])
    for ours, theirs in zip(*held, strict=True):
        theirs.pop("output.weight", None)  # a tied table stands twice in InternVL's own layout
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name].ravel(), theirs[name].ravel()) for name in ours)


def test_a_model_that_llama_cpp_does_not_have_is_named(make_run: MakeRun, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(check, "model_outputs", lambda *given: (torch.zeros(1), None))  # nothing is computed
    with pytest.raises(ValueError, match=r"layout minigpt4 has no form in llama\.cpp; what can: LLaVA, InternVL, Qwen2-VL"):
        export_gguf(open_run(make_run("minigpt4_toy"), build), tmp_path / "m.gguf", ExportOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
TOWER = {"hidden_size": 8, "num_hidden_layers": 2, "hidden_act": "gelu"}


@pytest.mark.parametrize(("change", "named"), [
    ({"text_config": QWEN2 | {"architectures": ["GptOssForCausalLM"]}}, "GptOssForCausalLM is not among"),
    ({"text_config": QWEN2 | {"rope_scaling": {"type": "longrope"}}}, "rope_type=longrope"),
    ({"ps_version": "v1"}, "ps_version=v1"),
    ({"vision_config": TOWER | {"hidden_act": "relu"}}, "hidden_act=relu is none of gelu and silu"),
])  # fmt: skip
def test_what_the_reader_would_take_otherwise_is_refused(change: dict[str, Any], named: str) -> None:
    config = {"model_type": "internvl", "vision_feature_layer": -1, "text_config": QWEN2, "vision_config": TOWER}
    assert gguf_faults("internvl_native", config) == []
    (fault,) = gguf_faults("internvl_native", config | change)
    assert named in fault


QWEN2_5 = {"depth": 8, "hidden_act": "silu", "window_size": 112, "fullatt_block_indexes": [3, 7]}


@pytest.mark.parametrize(("change", "named"), [
    ({"window_size": 48}, "window_size=48 of the tower: llama.cpp has .*window_size=112"),
    ({"fullatt_block_indexes": [3]}, r"fullatt_block_indexes=\[3\] of the tower: llama.cpp has .*fullatt_block_indexes=\[3, 7\]"),
    ({"fullatt_block_indexes": []}, r"fullatt_block_indexes=\[\] of the tower"),
    ({"spatial_merge_size": 3}, "spatial_merge_size=3 of the tower"),
])  # fmt: skip
def test_windows_that_the_reader_does_not_have_are_refused(change: dict[str, Any], named: str) -> None:
    text = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_act": "silu"}
    config = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": QWEN2_5}
    assert gguf_faults("qwen2_5_vl", config) == []
    (fault,) = gguf_faults("qwen2_5_vl", config | {"vision_config": QWEN2_5 | change})
    assert re.search(named, fault)


def test_factors_of_llama3_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256}  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=2048)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    found = llama3_factors({"hidden_size": 256, "num_attention_heads": 4, "rope_parameters": rope})
    torch.testing.assert_close(found, plain / scaled, rtol=1e-5, atol=0)
    assert len(set(found.tolist())) > 2


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def written(tokenizer: Tokenizer, folder: Path, rows: int, **config: Any) -> tuple[Any, list[str]]:
    tokenizer.add_tokens([AddedToken("</s>", special=True), AddedToken("<box>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.token_to_id("</s>"), 1]}))
    writer = gguf.GGUFWriter(folder / "words.gguf", "llama")
    notes = write_words(writer, folder, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return gguf.GGUFReader(folder / "words.gguf").fields, notes


def test_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    vocabulary = {text: i for i, text in enumerate("abc")} | {"ab": 3, "abc": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")]))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fields, notes = written(tokenizer, tmp_path, 9, chat_template="{{ 1 }}")
    assert notes == []
    wanted = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.chat_template": "{{ 1 }}",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "</s>", "<box>", "[PAD7]", "[PAD8]"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3, 4, 5, 5], "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 1,
    }  # fmt: skip
    assert {name: fields[name].contents() for name in wanted} == wanted
    with pytest.raises(ValueError, match="the tokenizer has 7 tokens and the language model 6 rows"):
        written(tokenizer, tmp_path, 6)


def test_a_sentencepiece_tokenizer_has_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<0x0A>", "▁", "a", "b", "▁a", "ab"])}
    merges = [("a", "b"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fields, notes = written(tokenizer, tmp_path, 9)
    assert notes == []
    scores = fields["tokenizer.ggml.scores"].contents()
    assert (scores[6], scores[5]) == (0.0, -1.0)  # "ab" is made before "▁a"
    assert max(scores[2:5]) < -1
    assert fields["tokenizer.ggml.token_type"].contents() == [1, 6, 1, 1, 1, 1, 1, 3, 4]
    kinds = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre", "add_space_prefix")}
    assert kinds == {"model": "llama", "pre": "default", "add_space_prefix": True}


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot have a tokenizer of kind WordLevel; BPE"):
        written(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), tmp_path, 3)
