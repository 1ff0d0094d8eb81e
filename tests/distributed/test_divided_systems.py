"""Systems whose batches differ in pictures, squares, frames and texts alone, on two processes: the same as on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import QUIET, STEPS, run_alone, run_pair
from runs import losses, weights

SMALL = (
    "debug=fast", f"max_steps={STEPS}", "logger=[history]", "trainer.accelerator=cpu", "callbacks.report=null",
    "callbacks.progress=null", "optimizer.eps=1.0e-5", "encoder.dim=32", "encoder.mlp_dim=32", "encoder.depth=2",
    "encoder.heads=2", "decoder.config.hidden_size=32", "decoder.config.intermediate_size=32",
    "decoder.config.num_hidden_layers=2", "decoder.config.num_attention_heads=2", "decoder.config.num_key_value_heads=2", *QUIET,
)  # fmt: skip
VIDEOS = "stages.{}.datasets.chats.weights={{questions:0.5,videos:0.5}}"
# The stage of a recipe, what it needs, its strategy, and names of weights that have to be among those compared.
SYSTEMS = {
    "internvl_2_5_toy": ("sft", (VIDEOS.format("sft"),), "ddp", "middleware.mlp1"),  # tiles, frames, square roots of lengths
    "llava_next_toy": ("supervised", (), "fsdp2", "middleware.image_newline"),
    "llava_onevision_toy": ("onevision", (VIDEOS.format("onevision"),), "ddp", "middleware.image_newline"),
    # features behind blocks of the decoder, divided block by block
    "qwen3_vl_toy": ("long", (VIDEOS.format("long"),), "fsdp2", "middleware.deep"),
}


def settings_of(system: str, run: Path, *more: str) -> list[str]:
    stage, own, _, _ = SYSTEMS[system]
    start = f"stages.{stage}.new=[encoder,middleware,decoder]"
    alone = (f"pipeline=[{stage}]", start, f"stages.{stage}.scheduler.warmup_steps=0")
    return [f"experiment={system}", *SMALL, *alone, *own, f"paths.run={run}", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs `one` and `two` of each system."""
    folder, jobs = tmp_path_factory.mktemp("systems"), []
    for system, (stage, _, strategy, _) in SYSTEMS.items():
        run_alone(*settings_of(system, folder / "one" / system, f"stages.{stage}.batch_size=8"))
        recomputed = ("activation_checkpointing=full",) if strategy == "fsdp2" else ()
        shared = ("trainer.devices=2", f"strategy={strategy}", f"stages.{stage}.batch_size=4", *recomputed)
        jobs.append({"train": settings_of(system, folder / "two" / system, *shared)})
    run_pair(folder, jobs)
    return folder


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_equal_one(system: str, runs: Path) -> None:
    stage, _, _, named = SYSTEMS[system]
    first, second = (losses(runs / way / system, stage) for way in ("one", "two"))
    assert len(first) == len(second) == STEPS
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    ours, theirs = (weights(runs / way / system, stage) for way in ("one", "two"))
    assert any(name.startswith(named) for name in ours)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
