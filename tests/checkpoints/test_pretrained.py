"""Folders of the original libraries: in, out, and everything that must be refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints import weight_files as files
from lightning_internvl.checkpoints.adapters import all_layouts, internvl_14b
from lightning_internvl.checkpoints.pretrained import save_pretrained
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official" / "internvl_g_stage2"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return load_file(OFFICIAL / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An official folder whose weights a test may replace."""
    (tmp_path / "model").mkdir()
    shutil.copy(OFFICIAL / "config.json", tmp_path / "model")
    return tmp_path / "model"


def assert_same_weights(ours: VLM, other: VLM) -> None:
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def test_round_trip_gives_back_the_official_names_shapes_values_and_config(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    load_pretrained(OFFICIAL).save_pretrained(tmp_path / "new" / "saved")
    saved = load_file(tmp_path / "new" / "saved" / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in weights.items()}
    assert all(saved[name].equal(weights[name]) for name in weights)
    assert json.loads((tmp_path / "new" / "saved" / "config.json").read_text()) == json.loads(
        (OFFICIAL / "config.json").read_text()
    )
    with safe_open(tmp_path / "new" / "saved" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert_same_weights(load_pretrained(tmp_path / "new" / "saved"), load_pretrained(OFFICIAL))


def test_the_model_is_ready_for_use_and_for_training() -> None:
    model = load_pretrained(OFFICIAL)
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert {p.dtype for p in load_pretrained(OFFICIAL, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_loaded_tensors_do_not_hang_on_the_file(folder: Path) -> None:
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    model = load_pretrained(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        file.write(b"\xff" * 1000)
    assert_same_weights(model, load_pretrained(OFFICIAL))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_scale_may_be_a_scalar_or_a_vector_of_one(
    folder: Path, weights: dict[str, torch.Tensor], shape: tuple[int, ...]
) -> None:
    save_file(weights | {"logit_scale": torch.full(shape, 2.25)}, folder / "model.safetensors")
    scale = load_pretrained(folder).objectives["itc"].logit_scale
    assert scale.tolist() == [2.25]


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = load_pretrained(OFFICIAL)
    save_pretrained(model, tmp_path / "sharded", max_shard_bytes=300_000)
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 5
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "sharded" / name).stat().st_size < 320_000 for name in shards)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(OFFICIAL / "model.safetensors").keys()
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert_same_weights(load_pretrained(tmp_path / "sharded"), model)

    (tmp_path / "sharded" / shards[1]).unlink()
    with pytest.raises(ValueError, match=shards[1]):
        load_pretrained(tmp_path / "sharded")


def test_an_index_may_not_lead_out_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": "../elsewhere.safetensors"}}))
    shutil.copy(OFFICIAL / "model.safetensors", folder.parent / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"not beside it: \.\./elsewhere"):
        load_pretrained(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors(folder: Path, weights: dict[str, torch.Tensor], zipped: bool) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_weights(load_pretrained(folder), load_pretrained(OFFICIAL))


def test_pickles_in_parts(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = list(weights)
    torch.save({n: weights[n] for n in names[:50]}, folder / "a.pth")
    torch.save({n: weights[n] for n in names[50:]}, folder / "b.pth")
    assert_same_weights(load_pretrained(folder), load_pretrained(OFFICIAL))
    torch.save({names[0]: weights[names[0]]}, folder / "c.pth")
    with pytest.raises(ValueError, match=f"repeats.*{names[0]}"):
        load_pretrained(folder)


class Intruder:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_not_run(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    target = folder / "was_run"
    torch.save(weights | {"extra": Intruder(target)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused"):
        load_pretrained(folder)
    assert not target.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_was_cut_off_is_refused_by_name(
    folder: Path, weights: dict[str, torch.Tensor], name: str, share: float
) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(weights, folder / name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        ValueError, match=rf"{name} (.* bytes. is damaged or cut off: .*; delete it and fetch it again|is refused)"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_refused_by_name(folder: Path, name: str, text: str) -> None:
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    (folder / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=rf"{name} (is damaged|should hold a JSON object)"):
        load_pretrained(folder)


def test_safetensors_come_before_pickles(folder: Path) -> None:
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    torch.save({"extra": Intruder(folder / "was_run")}, folder / "pytorch_model.bin")
    load_pretrained(folder)
    assert not (folder / "was_run").exists()


def test_a_pickle_of_something_else_is_refused(folder: Path) -> None:
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no tensor: step"):
        load_pretrained(folder)


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["itm_head.bias"], weights["vision_model.encoder.layers.1.ls1"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["language_model.norm.weight"] = torch.zeros(3)


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["text_projection"] = torch.zeros(48, 64)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (drop, [r"2 missing: itm_head\.bias \(2,\), vision_model\.encoder\.layers\.1\.ls1 \(80,\)"]),
        (add, [r"1 unexpected: language_model\.norm\.weight \(3,\)"]),
        (reshape, [r"1 of another shape: text_projection is \(48, 64\), the config says \(64, 48\)"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, weights: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], None], lines: list[str]
) -> None:
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit InternVL-14B") as error:
        load_pretrained(folder)
    assert len(str(error.value).splitlines()) == 1 + len(lines)
    for line in lines:
        assert error.match(line)


def test_long_lists_of_names_are_cut(folder: Path) -> None:
    save_file({f"strange.{i}": torch.zeros(1) for i in range(30)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"30 unexpected: strange\.0 .* and 10 more") as error:
        load_pretrained(folder)
    assert str(error.value).count("strange.") == 20


def test_a_position_table_of_another_size_is_not_resized_in_silence(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"force_image_size": 84}))
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"position_embedding is \(1, 17, 80\), the config says \(1, 37, 80\)"):
        load_pretrained(folder)


def test_rotary_buffers_of_old_files_are_ignored(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    buffers = {f"qllama.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(4)}
    save_file(weights | buffers, folder / "model.safetensors")
    assert_same_weights(load_pretrained(folder), load_pretrained(OFFICIAL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qllama_lora": 8}, "LoRA weights, which must be merged"),
        (
            {"vision_config": {"hidden_act": "relu"}},
            r"vision_config\.hidden_act='relu' is not supported; it must be 'gelu'",
        ),
        ({"vision_config": {"norm_type": "batch_norm"}}, "rms_norm, layer_norm"),
        ({"qllama_config": {"tie_word_embeddings": True}}, "tie_word_embeddings=True is not supported"),
        ({"model_type": "llama"}, r"model_type='llama'; .*known layouts: .*InternVL-14B"),
    ],
)
def test_a_config_that_we_cannot_build_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    merged = {k: config[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    (folder / "config.json").write_text(json.dumps(config | merged))
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_absent_fields_take_the_official_values() -> None:
    with torch.device("meta"):
        model = internvl_14b.LAYOUT.build({"model_type": "internvl", "qllama_config": {"vocab_size": 49954}}, set())
    count = sum(p.numel() for p in model.parameters())
    # Published: a tower of 5903 M; LLaMA-7B with 16 cross-attentions, 96 queries and two poolings beside it.
    assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6) == 5903
    assert 13.7e9 < count < 14.0e9
    assert model.encoder.encoder.layers[0].norm1.eps == model.middleware.qllama.model.norm.eps == 1e-6
    assert model.middleware.query_tokens.shape == (1, 96, 4096)


def test_names_go_both_ways(weights: dict[str, torch.Tensor]) -> None:
    model = load_pretrained(OFFICIAL)
    assert internvl_14b.LAYOUT.official_tensors(model.config, model.state_dict()).keys() == weights.keys()
    with pytest.raises(ValueError, match=r"no place for: decoder\.lm\.x"):
        internvl_14b.LAYOUT.official_tensors(model.config, {"decoder.lm.x": torch.zeros(1)})


def small_model(**qllama: Any) -> VLM:
    encoder = InternViT(
        image_size=8,
        patch_size=4,
        dim=12,
        depth=2,
        heads=2,
        mlp_dim=16,
        qkv_bias=True,
        norm="layer_norm",
        norm_eps=1e-5,
    )
    settings = {
        "vocab_size": 11,
        "dim": 8,
        "depth": 4,
        "heads": 2,
        "mlp_dim": 12,
        "num_queries": 3,
        "embed_dim": 6,
        "pool_heads": 2,
    }
    middleware = QLLaMA(encoder_dim=12, **settings | qllama)
    return VLM(encoder, middleware, objectives={"itc": ITC(label_smoothing=0.1), "itm": ITM(dim=8)})


@pytest.mark.parametrize("cross_every", [1, 2, 3, 4])
def test_a_model_trained_here_is_saved_in_the_official_layout(tmp_path: Path, cross_every: int) -> None:
    torch.manual_seed(0)
    model = small_model(cross_every=cross_every).eval()
    model.save_pretrained(tmp_path / "ours")
    loaded = load_pretrained(tmp_path / "ours")
    assert_same_weights(loaded, model)
    assert loaded.objectives["itc"].label_smoothing == 0.1
    pixels = torch.rand(2, 3, 8, 8)
    assert loaded.encode_image(pixels, mode="g").equal(model.encode_image(pixels, mode="g"))


def test_a_model_without_an_official_layout_is_refused(tmp_path: Path) -> None:
    encoder = InternViT(image_size=8, patch_size=4, dim=12, depth=2, heads=2, mlp_dim=16)
    connector = VLM(encoder, MLPConnector(encoder_dim=12, decoder_dim=8))
    for model in (connector, small_model(rope_theta=5e5)):
        with pytest.raises(
            ValueError,
            match=r"no layout of a folder is known for a model of encoder InternViT.*known layouts: .*InternVL-14B",
        ):
            model.save_pretrained(tmp_path / "no")
    model = small_model(decoder_dim=8)
    with pytest.raises(ValueError, match="no layout of a folder is known for a model of encoder InternViT, middleware QLLaMA"):
        model.save_pretrained(tmp_path / "no")
    with pytest.raises(ValueError, match=r"no place for: middleware\.mlp1"):
        save_pretrained(model, tmp_path / "no", layout="internvl_14b")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fail_at_the_third(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", fail_at_the_third)
    (tmp_path / "target").mkdir()
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(load_pretrained(OFFICIAL), tmp_path / "target", max_shard_bytes=300_000)
    assert len(written) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["target"]


def test_what_stands_at_the_target_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("full", "file"):
        with pytest.raises(ValueError, match="not an empty folder"):
            load_pretrained(OFFICIAL).save_pretrained(tmp_path / target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "notes.txt"]


def test_a_path_that_is_neither_folder_nor_hub_id_names_both() -> None:
    with pytest.raises(
        ValueError, match=r"'no/such/folder/here' is neither an existing folder nor an id that the Hugging Face hub"
    ):
        load_pretrained("no/such/folder/here")


def test_a_hub_id_is_fetched_without_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(OFFICIAL)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_weights(load_pretrained("someone/something"), load_pretrained(OFFICIAL))
    assert asked == [("someone/something", ["*.json", "*.safetensors"])]


@pytest.mark.parametrize(
    ("present", "message"),
    [((), "neither config.json"), (("config.json",), "holds no weights: expected model.safetensors")],
)
def test_an_incomplete_folder_says_what_it_lacks(tmp_path: Path, present: tuple[str, ...], message: str) -> None:
    for name in present:
        shutil.copy(OFFICIAL / name, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_a_folder_with_a_manifest_is_a_hand_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr("lightning_internvl.checkpoints.pretrained.load_model", lambda folder: small_model())
    assert load_pretrained(tmp_path, dtype=torch.float64).encoder.embeddings.class_embedding.dtype == torch.float64


def test_every_layout_says_its_name_and_knows_nothing_of_strangers() -> None:
    known = all_layouts().values()
    assert all(layout.NAME for layout in known)
    assert not any(layout.recognises({"model_type": "bert"}, {}) for layout in known)
