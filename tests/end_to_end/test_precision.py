"""Whatever runs the model beside the training step runs it in the precision of the stage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from runs import STAGES, TINY, losses, read_json, tiny_run, train_apart

from lightning_internvl.distributed.placement import set_products
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.model.vlm import VLM

CPU = "trainer.accelerator=cpu"


def test_sharded_weights_in_mixed_precision_train_and_are_measured(tmp_path: Path) -> None:
    """Blocks are gathered in bfloat16, so that nothing but the right context can run them: samples, tracking, evaluation."""
    run = tmp_path / "run"
    options = ("strategy=fsdp2", "trainer.precision=bf16-mixed", "callbacks.tracking.every_n_steps=2")
    outcome = train_apart(*TINY, f"paths.run={run}", CPU, *options)
    assert outcome.code == 0, outcome.err
    assert set(read_json(run / "metrics.json")) == set(STAGES)
    for stage in STAGES:
        assert len(list((run / "stages" / stage / "samples").glob("*.json"))) >= 2
        assert (run / "handoff" / stage).is_dir()
        assert all(math.isfinite(row["train/loss"]) for row in losses(run, stage))


def test_the_model_always_runs_in_the_precision_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is made of its results does not: similarities are compared in float32."""
    seen, embedded = set[torch.dtype | None](), set[torch.dtype]()
    read, embed = VLM.encode_image, Predictor.embed_images

    def encode_image(model: VLM, *args: object) -> torch.Tensor:
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return read(model, *args)

    def embed_images(bench: Predictor, *args: object) -> torch.Tensor:
        found = embed(bench, *args)
        embedded.add(found.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return found

    monkeypatch.setattr(VLM, "encode_image", encode_image)
    monkeypatch.setattr(Predictor, "embed_images", embed_images)
    options = ("pipeline=[contrastive]", "callbacks.tracking.every_n_steps=2")
    tiny_run(tmp_path / "run", CPU, "trainer.precision=bf16-mixed", *options)
    assert seen == {torch.bfloat16}
    assert embedded == {torch.float32}


def test_norms_of_sharded_blocks_take_float32_states_on_a_cpu(tmp_path: Path) -> None:
    """Weights of a LayerNorm are gathered in bfloat16 with their block; the residual stream is float32."""
    options = ("experiment=clip_toy", "debug=fast", "strategy=fsdp2", "trainer.precision=bf16-mixed")
    outcome = train_apart(*options, f"paths.run={tmp_path / 'run'}", CPU)
    assert outcome.code == 0, outcome.err
    assert all(math.isfinite(row["train/loss"]) for row in losses(tmp_path / "run", "contrastive"))


def test_products_of_float32_are_as_asked_on_a_gpu_and_exact_on_a_cpu() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        found = {}
        for kind in ("cuda", "cpu"):
            set_products("high", torch.device(kind))
            found[kind] = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == {"cuda": "high", "cpu": "highest"}
