"""The toy recipes of Qwen-VL and DeepSeek-VL, all stages, a few steps each."""

from __future__ import annotations

from pathlib import Path

from runs import read_json, train, weights

from lightning_internvl import load_pretrained

SMALL = (
    "debug=fast", "decoder.config.hidden_size=128", "decoder.config.intermediate_size=16", "decoder.config.num_hidden_layers=1",
    "data.held_out.scenes=12", "data.held_out.questions=8", "callbacks.samples.images=2",
    "data.chats_collate.max_text_tokens=500",
)  # fmt: skip


def run(folder: Path, experiment: str, stages: list[str], *more: str) -> Path:
    steps = [f"stages.{stage}.{key}" for stage in stages for key in ("max_steps=2", "batch_size=6", "scheduler.warmup_steps=1")]
    outcome = train(f"experiment={experiment}", *SMALL, *steps, *more, f"paths.run={folder}")
    assert outcome.code == 0, outcome.err
    return folder


def changed(folder: Path, before: str, after: str) -> set[str]:
    """Parts, and towers inside one, of which a stage has changed any tensor."""
    old, new = weights(folder, before), weights(folder, after)
    names = {name for name in old if not new[name].equal(old[name])}
    return {".".join(name.split(".")[: 2 if name.startswith(("encoder.low", "encoder.high")) else 1]) for name in names}


def test_qwen_vl(tmp_path: Path) -> None:
    stages = ["pretrain", "multitask", "sft"]
    folder = run(tmp_path / "run", "qwen_vl_toy", stages, "encoder.dim=24", "encoder.depth=1", "encoder.heads=3")
    assert set(read_json(folder / "metrics.json")) == set(stages)
    assert changed(folder, "pretrain", "multitask") == {"encoder", "middleware", "decoder"}
    assert changed(folder, "multitask", "sft") == {"middleware", "decoder"}  # the tower is frozen
    model = load_pretrained(folder / "handoff" / "sft")
    model.save_pretrained(tmp_path / "official", layout="qwen_vl")
    assert (tmp_path / "official" / "config.json").is_file()


def test_deepseek_vl(tmp_path: Path) -> None:
    stages = ["alignment", "joint", "sft"]
    folder = run(
        tmp_path / "run",
        "deepseek_vl_toy",
        stages,
        "encoder.low.depth=1",
        "encoder.high.depth=2",
        "encoder.high.global_layers=[1]",
    )
    assert set(read_json(folder / "metrics.json")) == set(stages)
    assert changed(folder, "alignment", "joint") == {"middleware", "decoder"}
    assert changed(folder, "joint", "sft") == {"encoder.low", "middleware", "decoder"}  # SAM is frozen
    model = load_pretrained(folder / "handoff" / "sft")  # two towers inside one part's configuration
    model.save_pretrained(tmp_path / "native")
    assert read_json(tmp_path / "native" / "config.json")["model_type"] == "deepseek_vl_hybrid"
    assert load_pretrained(tmp_path / "native").encoder.dims == model.encoder.dims


def test_one_tower(tmp_path: Path) -> None:
    choice = ("encoder=siglip_chat_toy", "middleware=mlp", "processor@data.processor=padded", "data.image_size=96")
    folder = run(
        tmp_path / "run", "deepseek_vl_toy", ["alignment"], *choice, "pipeline=[alignment]", "encoder.dim=24", "encoder.heads=3",
        "encoder.depth=1",
    )  # fmt: skip
    assert load_pretrained(folder / "handoff" / "alignment").middleware.skipped == 0
