"""What a DeepStack needs of its neighbours is said before PyTorch is imported."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.cli import CONF
from lightning_internvl.config.fit import fit_faults
from lightning_internvl.config.stage_settings import stage_settings

TOWER = ("encoder=clip_vit_toy", "middleware=deepstack_toy")


def faults(*words: str) -> list[str]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=["pipeline=[supervised]", "paths.run=unused", *words])
    return list(fit_faults(stage_settings(OmegaConf.to_container(composed, resolve=True), "supervised")))


def test_what_fits_is_accepted() -> None:
    assert not faults(*TOWER)
    assert not faults("encoder=clip_vit_l14", "middleware=deepstack", "processor@data.processor=squash")


def faults_of_qwen(*words: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=["experiment=qwen3_vl_toy", "paths.run=unused", *words])
    return "\n".join(fit_faults(stage_settings(OmegaConf.to_container(composed, resolve=True), "long")))


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("middleware.factor=3", r"patches to a side of a block differ, .*encoder\.merge_size=2, middleware\.factor=3, decoder"),
        ("encoder.merge_size=3", r"grids would not divide: encoder\.merge_size=3, middleware\.factor=2"),
        ("data.processor.patch_size=16", r"encoder\.patch_size=24, data\.processor\.patch_size=16; give all of them"),
        ("encoder.frames=4", r"frames of a step differ.*encoder\.frames=4, data\.processor\.frames=2"),
        ("decoder.steps_apart=false", "decoder.steps_apart=false and template qwen3_vl write videos in two ways"),
        ("data.chats_collate.template=qwen2_vl", "decoder.steps_apart=true and template qwen2_vl write videos in two ways"),
    ],
)
def test_grids_and_times_that_do_not_fit(word: str, named: str) -> None:
    assert not faults_of_qwen()
    assert re.search(named, faults_of_qwen(word)), faults_of_qwen(word)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["middleware.deep_layers=[1,9]"], r"middleware\.deep_layers=\[9\] do not exist in CLIPViT; with \d blocks"),
        (["middleware.into=[0,7]"], r"feeds blocks \[7\] of a decoder that has 0 to \d; change middleware\.into"),
        (["decoder=t5_toy"], "feeds blocks of the decoder, and HFSeq2SeqLM does not take"),
        (["decoder=flamingo_toy"], "feeds blocks of the decoder, and FlamingoCausalLM does not take"),
        (["encoder=sam_toy"], r"SamViT gives its last layer alone, and middleware DeepStackMLP reads \[1, 2\] too"),
        (["middleware=deepstack_merger", "middleware.deep_layers=[1]"], "do not fit"),
    ],
)
def test_what_does_not_is_named(words: list[str], named: str) -> None:
    found = "\n".join(faults(*TOWER, *words))
    assert re.search(named, found), found
