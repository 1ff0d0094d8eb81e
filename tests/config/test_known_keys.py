"""A slip in a recipe file is named at any depth, with the nearest valid word, before PyTorch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from runs import ROOT

from lightning_internvl.cli import CONF
from lightning_internvl.config.checks import check_config
from lightning_internvl.config.known_keys import variables_of
from lightning_internvl.config.signatures import Signature, signature_of
from lightning_internvl.messages import ConfigError

SLIPS = {
    # setting in a recipe: what it must be answered with
    "data.packng": "data: there is no setting 'packng'; did you mean 'packing'?",
    "data.max_bad_fractoin": "did you mean 'max_bad_fraction'?",
    "data.pairs_collate.itc_promt": "data.pairs_collate: there is no setting 'itc_promt'; did you mean 'itc_prompt'?",
    "data.chats_collate.templat": "did you mean 'template'?",
    "data.pairs.langages": "data.pairs: there is no setting 'langages'; did you mean 'languages'?",
    "data.held_out.sceens": "did you mean 'scenes'?",
    "data.processor.image_siez": "did you mean 'image_size'?",
    "data.eval_processor.image_siez": "data.eval_processor: there is no setting 'image_siez'",
    "stages.contrastive.datasets.num_wrokers": "datasets: there is no setting 'num_wrokers'; did you mean 'num_workers'?",
    "stages.contrastive.datasets.pairs.langages": "datasets.pairs: there is no setting 'langages'",
    "stages.contrastive.samples.writter": "samples: there is no setting 'writter'; did you mean 'writer'?",
    "stages.contrastive.collate.max_lenght": "collate: there is no setting 'max_lenght'; did you mean 'max_length'?",
    "stages.contrastive.collate.processor.image_siez": "did you mean 'image_size'?",
    "stages.contrastive.module.keep_token": "module: there is no setting 'keep_token'; did you mean 'keep_tokens'?",
    "stages.contrastive.module.weights.itcc": "module.weights: there is no setting 'itcc'; did you mean 'itc'?",
    "stages.contrastive.module.model": "module: there is no setting 'model'",
    "stages.contrastive.objectives.itc.max_scal": "objectives.itc: there is no setting 'max_scal'",
    "stages.contrastive.evaluation.retrieval.languag": "did you mean 'language'?",
    "stages.contrastive.evaluation.retreival.mode": "evaluation: there is no 'retreival' to change",
    "stages.contrastive.optimizer.weight_dcay": "stages.contrastive: optimizer: there is no setting 'weight_dcay'",
    "stages.contrastive.trainer.acumulate_grad_batches": "did you mean 'accumulate_grad_batches'?",
    "stages.contrastive.encoder.drop_pth": "encoder: there is no setting 'drop_pth'",
    "stages.contrastive.feature_cache.gb": "feature_cache",
    "stages.contrastve.max_steps": "stages: there is no stage 'contrastve' to change",
    "strategy.reshard": "strategy: there is no setting 'reshard'; did you mean 'reshard_after_forward'?",
    "trainer.gradient_clip_value": "trainer: there is no setting 'gradient_clip_value'; did you mean 'gradient_clip_val'?",
    "optimizer.beta": "did you mean 'betas'?",
    "scheduler.warmup_step": "did you mean 'warmup_steps'?",
    "callbacks.tracking.every_n_step": "did you mean 'every_n_steps'?",
    "callbacks.trackng.every_n_steps": "there is no 'trackng' to change, and it has no _target_; did you mean 'tracking'?",
    "logger.tensorboard.save_dirr": "did you mean 'save_dir'?",
    "logger.history.pth": "did you mean 'path'?",
    "encoder.dimm": "encoder: there is no setting 'dimm'; did you mean 'dim'?",
    "middleware.tokenizer.foldr": "middleware.tokenizer: there is no setting 'foldr'",
    "peft.decoder.rnk": "peft.decoder",
    "paths.rot": "paths: there is no setting 'rot'; did you mean 'root'?",
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["pipeline=[contrastive,supervised]", "peft=lora", *overrides])


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return composed("strategy=fsdp2", "trainer.accelerator=cpu")


def with_setting(config: DictConfig, path: str, value: Any) -> DictConfig:
    config = config.copy()
    with open_dict(config):
        OmegaConf.update(config, path, value, force_add=True)
    return config


def check(config: DictConfig) -> None:
    check_config(OmegaConf.to_container(config, resolve=True), variables_of(OmegaConf.to_container(config), "scenes"))


@pytest.mark.parametrize(("path", "message"), SLIPS.items(), ids=list(SLIPS))
def test_a_slip_is_named(default: DictConfig, path: str, message: str) -> None:
    if "feature_cache" in path:
        default = with_setting(default, path.rpartition(".")[0], {"where": "memory", "gib": 4})
    with pytest.raises(ConfigError) as raised:
        check(with_setting(default, path, 1))
    assert message in str(raised.value)


def test_variables_that_something_refers_to_are_known(default: DictConfig) -> None:
    config = with_setting(default, "data.my_root", "/pictures")
    with pytest.raises(ConfigError, match="there is no setting 'my_root'"):
        check(config)
    check(with_setting(config, "data.pairs.styles", ["${data.my_root}"]))
    config = with_setting(default, "data.mine.root", "/pictures")
    check(with_setting(config, "data.pairs.styles", ["${...mine.root}"]))
    plain = OmegaConf.to_container(config, resolve=True)
    check_config(plain)  # of a run, in which nothing refers to anything any more


def test_own_classes_are_left_to_their_own_checks(default: DictConfig) -> None:
    node = {"_target_": "mine.Callback", "anything": 1}
    check(with_setting(default, "callbacks.mine", node))


def test_a_class_that_is_not_there(default: DictConfig) -> None:
    config = with_setting(default, "callbacks.mine", {"_target_": "callbacks.Trackin"})
    with pytest.raises(ConfigError, match="cannot be found; did you mean 'Tracking'"):
        check(config)


def test_signatures_are_those_of_the_classes() -> None:
    stage = signature_of("lightning_internvl.stages.ContrastiveStage")
    assert stage is not None
    assert {"cached_chunk", "train", "weights", "seed"} <= set(stage.names)
    assert not stage.anything
    assert signature_of("callbacks.Report") == Signature((), False)
    assert signature_of("mine.Callback") is None
    ddp = signature_of("lightning.pytorch.strategies.DDPStrategy")
    assert ddp is not None
    assert "find_unused_parameters" in ddp.names
    assert not ddp.anything


def test_pytorch_is_not_imported_for_it(tmp_path: Path) -> None:
    recipes = tmp_path / "experiment"
    recipes.mkdir()
    (recipes / "mine.yaml").write_text("# @package _global_\nstages: {contrastive: {samples: {writter: decoder}}}\n")
    script = "import runpy, sys\ntry: runpy.run_path('train.py', run_name='__main__')\nfinally: print('torch' in sys.modules)"
    own = ["hydra.searchpath=[file://" + str(tmp_path) + "]", "experiment=mine", f"paths.run={tmp_path}/run"]
    done = subprocess.run([sys.executable, "-c", script, *own], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "did you mean 'writer'?" in done.stderr
    assert done.returncode == 2
    assert done.stdout == "False\n"
