"""Released layouts in, native layout out: InternVL-Chat with LLaMA and InternLM2, bare .pth files, towers, resized tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_native import BATCHES, IMAGE, their_model
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import all_layouts
from lightning_internvl.checkpoints.families.language_model import fused_rows
from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.checkpoints.weight_files import WeightFiles, read_config
from lightning_internvl.layers.basic import resize_positions
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM

FIXTURES = Path(__file__).parents[1] / "fixtures" / "official"
HEADS, GROUPS, HEAD = 4, 2, 8


ROOTS = [FIXTURES.parent, *map(Path, filter(None, os.environ.get("PARITY_FIXTURES", "").split(os.pathsep)))]
NO_MODELS = ("internvl15_preprocess", "llava_preprocess", "open_clip_loss")  # golden tensors of functions alone
FOLDERS = {
    f"{path.parent.parent.name}/{path.parent.name}": path.parent
    for root in ROOTS
    for path in sorted(root.glob("*/*/fixture.json"))
    if path.parent.name not in NO_MODELS
}


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS.keys())
def test_exactly_one_layout_recognises_a_checkpoint(folder: Path) -> None:
    config, shapes = read_config(folder), WeightFiles(folder).shapes
    assert len([name for name, layout in all_layouts().items() if layout.recognises(config, shapes)]) == 1


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A 6B-style model as transformers writes it."""
    torch.manual_seed(0)
    their_model("llama", "6B style", False, -1).save_pretrained(tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    # q/k norms of the releases take their eps from the config, those of transformers do not.
    config["vision_config"]["layer_norm_eps"] = 1e-6
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    return tmp_path / "native"


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_native_to_released_and_back_to_transformers(tmp_path: Path, native: Path) -> None:
    model = load_pretrained(native)
    model.save_pretrained(tmp_path / "released", layout="internvl_chat")
    names = load_file(tmp_path / "released" / "model.safetensors").keys()
    assert {"vision_model.encoder.layers.0.attn.qkv.weight", "mlp1.0.weight", "mlp1.3.bias"} <= names
    assert {"language_model.model.layers.1.self_attn.q_proj.weight", "language_model.lm_head.weight"} <= names
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    assert (config["ps_version"], config["select_layer"], config["downsample_ratio"]) == ("v2", -1, 0.5)

    released = load_pretrained(tmp_path / "released")
    released.save_pretrained(tmp_path / "again")
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    for make in BATCHES.values():
        torch.manual_seed(1)
        inputs = make()
        torch.testing.assert_close(logits(released, inputs), logits(theirs, inputs))


def internlm2(native: Path, folder: Path) -> Path:
    """The same model with its language model in InternLM2's layout, put together by hand from that layout's description."""
    load_pretrained(native).save_pretrained(folder, layout="internvl_chat")
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    text = config["llm_config"]
    text |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "num_key_value_heads": GROUPS}
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith("language_model."):
            renamed[name] = tensor
            continue
        for old, new in {
            "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        }.items():  # fmt: skip
            name = name.replace(old, new)
        renamed[name] = tensor
    for layer in range(2):
        base = f"language_model.model.layers.{layer}"
        q, k, v = (renamed.pop(f"{base}.self_attn.{x}_proj.weight") for x in "qkv")
        rows = []
        for group in range(GROUPS):  # the queries of a group, its key, its value
            rows += [q[(group * 2 + i) * HEAD :][:HEAD] for i in range(HEADS // GROUPS)]
            rows += [k[group * HEAD :][:HEAD], v[group * HEAD :][:HEAD]]
        renamed[f"{base}.attention.wqkv.weight"] = torch.cat(rows)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_internlm2_in_and_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    their_model("mistral", "rms norm without", False, -1).save_pretrained(tmp_path / "native")  # 4 heads in 2 groups
    folder = internlm2(tmp_path / "native", tmp_path / "released")
    model, inputs = load_pretrained(folder), BATCHES["left padding"]()
    assert model.decoder.lm.config.model_type == "llama"
    assert model.image_token_id == IMAGE
    model.save_pretrained(tmp_path / "native again")
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native again").eval()
    torch.testing.assert_close(logits(model, inputs), logits(theirs, inputs))
    torch.testing.assert_close(logits(model, inputs), logits(load_pretrained(tmp_path / "native"), inputs))

    model.save_pretrained(tmp_path / "released again", layout="internvl_chat")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "released again"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert json.loads((tmp_path / "released again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_fused_rows_go_both_ways() -> None:
    rule = fused_rows("ours", "theirs", "weight", heads=6, groups=2)
    fused = torch.randn(2 * (3 + 2) * 4, 5)
    q, k, v = rule.read(fused)
    assert (q.shape, k.shape, v.shape) == ((24, 5), (8, 5), (8, 5))
    assert rule.write(q, k, v)[0].equal(fused)


def test_lora_weights_and_unknown_shuffles_are_refused(tmp_path: Path, native: Path) -> None:
    load_pretrained(native).save_pretrained(tmp_path / "released", layout="internvl_chat")
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    for change, message in (
        ({"use_llm_lora": 16}, "LoRA weights, which must be merged"),
        ({"ps_version": "v3"}, "v1, v2"),
        ({"llm_config": {}}, "no model_type"),
        ({"model_type": "internvl_chat_next"}, r"model_type='internvl_chat_next'; .*known layouts: .*internvl_native"),
    ):
        (tmp_path / "released" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "released")


def test_a_transposed_shuffle_has_no_native_layout(tmp_path: Path, native: Path) -> None:
    model = load_pretrained(native)
    model.middleware.version = "v1"
    with pytest.raises(ValueError, match="the layout internvl_native is none for a model of encoder InternViT"):
        model.save_pretrained(tmp_path / "no", layout="internvl_native")
    model.save_pretrained(tmp_path / "released")  # the only one left
    assert json.loads((tmp_path / "released" / "config.json").read_text())["ps_version"] == "v1"
    with pytest.raises(ValueError, match=r"there is no layout 'native'; valid choices: .*intern_vit, "):
        model.save_pretrained(tmp_path / "no", layout="native")


def test_layers_behind_the_one_that_is_read_are_kept_and_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    their_model("llama", "6B style", False, -3).save_pretrained(tmp_path / "native")
    model, inputs = load_pretrained(tmp_path / "native"), BATCHES["several tiles"]()
    before = logits(model, inputs)
    model.encoder.encoder.layers[2].register_forward_hook(lambda *_: pytest.fail("the last layer was run"))
    assert logits(model, inputs).equal(before)


# --- bare files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """InternVL-C as the bare file of the first release, made from the 14B layout by the published renaming."""
    weights, names = load_file(FIXTURES / "internvl_g_stage2" / "model.safetensors"), {}
    for name, tensor in weights.items():
        if name.startswith("vision_model."):
            name = name.removeprefix("vision_model.").replace("encoder.layers.", "blocks.")
            name = name.replace("embeddings.class_embedding", "cls_token").replace("embeddings.position_embedding", "pos_embed")
            name = name.replace("embeddings.patch_embedding", "patch_embed.proj")
            names[name + (".gamma" if name.endswith(("ls1", "ls2")) else "")] = tensor
        elif name.startswith("qllama.model.") and "cross_attn" not in name:
            names["transformer." + name.removeprefix("qllama.model.")] = tensor
        elif name.startswith("clip_projector.") or name in ("text_projection", "logit_scale"):
            names[name] = tensor.reshape(()) if name == "logit_scale" else tensor
    (tmp_path / "first").mkdir()
    torch.save(names, tmp_path / "first" / "internvl_c.pth")
    # Toy widths have other numbers of heads than the published one, which the file does not tell.
    config = json.loads((FIXTURES / "internvl_g_stage2" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    return tmp_path / "first" / "internvl_c.pth"


def embeddings(model: VLM) -> tuple[Tensor, Tensor]:
    inputs = load_file(FIXTURES / "internvl_g_stage2" / "inputs.safetensors")
    with torch.no_grad():
        return (
            model.encode_image(inputs["pixel_values"]),
            model.encode_text(inputs["summarize_ids"], inputs["summarize_mask"]),
        )


@pytest.mark.parametrize("wrapped", [False, True])
def test_internvl_c_in_one_file(tmp_path: Path, first: Path, wrapped: bool) -> None:
    if wrapped:
        torch.save({"module": torch.load(first, weights_only=True)}, first)
    model = load_pretrained(first)
    outputs = load_file(FIXTURES / "internvl_g_stage2" / "outputs.safetensors")
    for found, name in zip(embeddings(model), ("c.image_embeds", "c.text_embeds"), strict=True):
        torch.testing.assert_close(found, outputs[name], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again.pth")
    before, after = (torch.load(f, weights_only=True) for f in (first, tmp_path / "again.pth"))
    before = before.get("module", before)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert all(after[name].equal(before[name]) for name in before)


def test_a_tower_in_one_file(tmp_path: Path, first: Path) -> None:
    weights = torch.load(first, weights_only=True)
    torch.save({n: t for n, t in weights.items() if not n.startswith(("transformer.", "text_", "logit_"))}, first)
    model = load_pretrained(first)
    inputs = load_file(FIXTURES / "internvl_g_stage2" / "inputs.safetensors")
    outputs = load_file(FIXTURES / "internvl_g_stage2" / "outputs.safetensors")
    torch.testing.assert_close(
        model.encoder(inputs["pixel_values"])[0].detach(), outputs["vision_last_hidden"], rtol=1e-4, atol=1e-4
    )
    for layout in ("intern_vit", "intern_vit_native"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        again = load_pretrained(tmp_path / layout)
        assert again.encoder(inputs["pixel_values"])[0].equal(model.encoder(inputs["pixel_values"])[0])


def test_published_sizes_are_read_from_shapes_alone() -> None:
    shapes = {"patch_embed.proj.weight": (3200, 3, 14, 14), "pos_embed": (1, 257, 3200), "cls_token": (1, 1, 3200)}
    shapes |= {f"blocks.{i}.mlp.fc1.weight": (12800, 3200) for i in range(48)} | {"blocks.0.attn.q_norm.weight": (3200,)}
    with torch.device("meta"):
        model = all_layouts()["intern_vit_first"].build({}, shapes)
    encoder = model.encoder
    assert (encoder.dim, encoder.depth, encoder.image_size, encoder.encoder.layers[0].attn.heads) == (3200, 48, 224, 25)
    assert sum(p.numel() for p in encoder.parameters()) == 5_902_793_600  # published: 5903 M


# --- position tables ----------------------------------------------------------------------------------------------------


def test_the_position_table_is_resized_when_asked_for(native: Path) -> None:
    small, large = load_pretrained(native), load_pretrained(native, image_size=48)
    assert large.encoder.image_size == 48
    expected = resize_positions(small.encoder.embeddings.position_embedding, 8)
    assert large.encoder.embeddings.position_embedding.equal(expected)
    pixels = torch.randn(1, 3, 48, 48)
    assert large.encoder(pixels)[0].equal(small.encoder(pixels)[0])


def test_a_stage_may_change_the_resolution() -> None:
    torch.manual_seed(0)
    model = load_pretrained(FIXTURES / "internvl_g_stage2")
    tensors = {name: tensor.clone() for name, tensor in own_tensors(model).items()}
    model.encoder.resize(84)
    with torch.no_grad():
        model.encoder.embeddings.position_embedding.zero_()
    report = LoadReport.of(model, tensors, source="before", new=(), dropped=())
    assert report.resized == ["encoder.embeddings.position_embedding"]
    report.load(model, tensors)
    table = tensors["encoder.embeddings.position_embedding"]
    assert model.encoder.embeddings.position_embedding.equal(resize_positions(table, 6))
    with pytest.raises(ValueError, match=r"another shape.*\n.*position_embedding: \(1, 16, 80\), \(1, 37, 80\)"):
        LoadReport.of(model, tensors | {report.resized[0]: torch.zeros(1, 16, 80)}, source="x", new=(), dropped=())


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json", None])
def test_the_placeholder_is_found_in_the_tokenizer(tmp_path: Path, native: Path, file: str | None) -> None:
    load_pretrained(native).save_pretrained(tmp_path / "released", layout="internvl_chat")
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    del config["image_token_id"]
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    contents = {
        "added_tokens.json": {"<IMG_CONTEXT>": 7},
        "tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "<IMG_CONTEXT>"}}},
        "tokenizer.json": {"added_tokens": [{"id": 7, "content": "<IMG_CONTEXT>"}]},
    }
    if file:
        (tmp_path / "released" / file).write_text(json.dumps(contents[file]))
    assert load_pretrained(tmp_path / "released").image_token_id == (7 if file else None)
