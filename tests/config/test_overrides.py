"""What the command line gives holds in every stage: command line > recipe > stage file > common group."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import TINY, call, losses, train

from lightning_internvl.cli import CONF, given_settings
from lightning_internvl.config.checks import check_config
from lightning_internvl.config.given import Given, check_given_once
from lightning_internvl.config.overrides import with_given
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.messages import ConfigError

GROUPS = ("optimizer", "scheduler", "trainer")
RECIPES = ("internvl_toy", "finetune", "internvl_probe_toy", "internvl", "scenes_smollm2")
CHANGED = {"accelerator": "cpu", "precision": "64-true", "_target_": None}  # names that are known, or none that is changed so


def composed(*words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(words)), resolve=True)


def taken(*words: str, recipe: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """A configuration as a command line makes it, and what is told."""
    return with_given(composed(*words), given_settings(words), recipe)


def settings(config: dict[str, Any], group: str) -> dict[str, dict[str, Any]]:
    """A group by stage of the pipeline, as the stage is built from it."""
    found = {name: getattr(stage_settings(config, name), group) for name in config["pipeline"]}
    return {name: node.node if group == "trainer" else node for name, node in found.items()}


def leaves(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        elif CHANGED.get(key, "") is not None and not key.startswith("_"):
            yield (*path, key), value


def other(key: str, value: Any) -> Any:
    """A value that no file has."""
    if key in CHANGED:
        return CHANGED[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 3
    return {"encoder": 0.25} if isinstance(value, dict) else [0.5, 0.6] if isinstance(value, list) else "other"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_training_reaches_every_stage_or_is_refused(recipe: str) -> None:
    start = ["init_from=owner/name"] if recipe == "finetune" else []
    config, seen, refused = composed(f"experiment={recipe}", *start), 0, {}
    for group in GROUPS:
        for path, value in leaves(config[group], (group,)):
            new, changed = other(path[-1], value), copy.deepcopy(config)
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = new
            given = Given(path, new, "value", f"{'.'.join(path)}={new}")
            try:
                found, _ = with_given(changed, [given])
            except ConfigError as error:
                refused[given.text] = str(error)
                continue
            for name, own in settings(found, group).items():
                if "_target_" in (config["stages"][name].get(group) or {}) and path[1] not in own:
                    continue  # a class of the stage's own that does not take it
                for key in path[1:]:
                    own = own[key]
                expected = {**own, **new} if isinstance(new, dict) else new
                assert own == expected, (name, path)
            seen += 1
    assert seen > 15
    assert all(text in said for text, said in refused.items())


def test_the_line_of_a_stage_says_what_was_replaced() -> None:
    found, told = taken("optimizer.lr=1e-9", "scheduler.warmup_steps=5")
    assert told[0] == "contrastive: optimizer.lr 1e-09 in place of 0.001; scheduler.warmup_steps 5 in place of 40"
    assert [line.partition(":")[0] for line in told] == found["pipeline"]
    assert {own["lr"] for own in settings(found, "optimizer").values()} == {1e-9}
    check_config(found)
    config = composed()
    assert with_given(config, []) == (config, [])


def test_what_is_given_for_one_stage_wins_in_any_order() -> None:
    words = ["stages.generative.optimizer.lr=0.5", "optimizer.lr=0.25"]
    for order in (words, words[::-1]):
        rates = {name: own["lr"] for name, own in settings(taken(*order)[0], "optimizer").items()}
        assert rates == {"contrastive": 0.25, "generative": 0.5, "words": 0.25, "supervised": 0.25}


def test_a_recipe_wins_over_stage_files_and_loses_to_the_command_line() -> None:
    recipe = {"optimizer": {"lr": 0.125}, "stages": {"supervised": {"optimizer": {"lr": 0.75}}}}
    words = ["optimizer.lr=0.125", "stages.supervised.optimizer.lr=0.75"]  # which stand for the recipe's
    found, told = with_given(composed(*words), [], recipe)
    assert [own["lr"] for own in settings(found, "optimizer").values()] == [0.125, 0.125, 0.125, 0.75]
    assert told[0] == "contrastive: optimizer.lr 0.125 of the recipe in place of 0.001"
    words[0] = "optimizer.lr=0.5"
    found, _ = with_given(composed(*words), given_settings(words[:1]), recipe)
    assert {own["lr"] for own in settings(found, "optimizer").values()} == {0.5}


def test_another_optimizer_keeps_what_it_takes_of_a_stage() -> None:
    found, told = taken("experiment=internvl", "optimizer=sgd")
    own = settings(found, "optimizer")["generative"]
    assert own["_target_"] == "lightning_internvl.training.optim.sgd"
    assert own["lr"] == 5e-5
    assert "betas" not in own
    assert told[2] == "generative: optimizer=sgd with its lr 5e-05, weight_decay 0.05 and without its betas [0.9, 0.98]"
    own = settings(taken("experiment=internvl", "optimizer=sgd", "optimizer.lr=0.5")[0], "optimizer")["generative"]
    assert own["lr"] == 0.5


def test_another_optimizer_takes_the_place_of_a_stages_own_class() -> None:
    found, told = taken("experiment=internvl_probe_toy", "optimizer=adamw")
    own = settings(found, "optimizer")["probe"]
    assert own == composed()["optimizer"]
    assert told[-1] == "probe: optimizer=adamw in place of sgd and its settings"
    words = ["experiment=internvl_probe_toy", "optimizer=adamw", "stages.probe.optimizer.lr=0.01"]
    assert settings(taken(*words)[0], "optimizer")["probe"]["lr"] == 0.01


def test_another_schedule_keeps_the_warm_up_of_a_stage() -> None:
    found, _ = taken("experiment=internvl", "scheduler=constant")
    own = settings(found, "scheduler")["contrastive"]
    assert (own["warmup_steps"], own["min_ratio"]) == (5000, 1.0)


def test_lengths() -> None:
    def lengths(*words: str) -> list[int]:
        found, _ = taken(*words)
        return [stage_settings(found, name).max_steps for name in found["pipeline"]]

    assert lengths("experiment=finetune", "init_from=owner/name", "max_steps=2000") == [2000]
    assert lengths("max_steps=7") == [7, 7, 7, 7]
    assert lengths("max_steps=7", "stages.generative.max_steps=9") == [7, 9, 7, 7]
    assert lengths("debug=fast") == [4, 4, 4, 4]  # of a file: none runs longer
    assert lengths("debug=fast", "stages.generative.max_steps=9") == [4, 9, 4, 4]
    assert lengths("debug=fast", "max_steps=9") == [9, 9, 9, 9]
    assert lengths("debug=fast", "max_steps=null") == [500, 1300, 80, 1250]
    assert lengths("epochs=2") == [0, 0, 0, 0]  # as long as nobody has looked at the data
    assert lengths("epochs=2", "stages.generative.max_steps=9") == [0, 9, 0, 0]
    assert lengths("debug=fast", "stages.generative.epochs=9") == [4, 0, 4, 4]
    with pytest.raises(ConfigError, match="max_steps='many' must be a whole number above 0"):
        check_config(taken("max_steps=many")[0])


def test_a_length_in_epochs_and_one_in_steps_replace_each_other() -> None:
    start = ("experiment=finetune", "init_from=owner/name")

    def length(*words: str) -> tuple[Any, ...]:
        found, told = taken(*start, *words)
        assert found["epochs"] is None
        return *(found["stages"]["finetune"][word] for word in ("epochs", "max_steps")), told

    assert length() == (3, None, [])
    assert length("epochs=0.5") == (0.5, None, ["finetune: epochs 0.5 in place of 3"])
    assert length("max_steps=7") == (None, 7, ["finetune: max_steps 7 in place of epochs 3"])
    assert length("stages.finetune.max_steps=7") == (None, 7, [])
    for words in (["epochs=1", "max_steps=7"], [f"stages.finetune.{word}" for word in ("epochs=1", "max_steps=7")]):
        with pytest.raises(ConfigError, match=r"max_steps=7 and .*epochs=1 both say how long to train; leave one out"):
            length(*words)
    with pytest.raises(ConfigError, match="epochs=0 must be a number above 0"):
        check_config(taken(*start, "epochs=0")[0])


def test_rates_of_parts() -> None:
    rates = settings(taken("+optimizer.part_lr.encoder=0.5")[0], "optimizer")["contrastive"]["part_lr"]
    assert next(iter(rates.items())) == ("encoder", 0.5)  # the first that matches wins
    for words in (["optimizer.part_lr=null"], ["optimizer.part_lr={}"], ["stages.contrastive.optimizer.part_lr={}"]):
        assert not settings(taken(*words)[0], "optimizer")["contrastive"]["part_lr"]
    found, told = taken("~stages.contrastive.optimizer.part_lr")
    assert (settings(found, "optimizer")["contrastive"]["part_lr"], told) == ({}, [])
    found, told = taken("~optimizer.part_lr")
    assert "part_lr" not in settings(found, "optimizer")["contrastive"]
    assert told[0].startswith("contrastive: without its optimizer.part_lr {")


def test_adapters_and_quantisation() -> None:
    found, told = taken("experiment=scenes_smollm2", "peft.decoder.rank=4", "+data.name=null")
    assert stage_settings(found, "supervised").parts.peft["decoder"]["rank"] == 4
    assert told == ["words: peft.decoder.rank=4 does not reach it: stages.words.peft.decoder=null"]
    with pytest.raises(ConfigError, match=r"peft\.decoder\.rank=4 has no effect: stages\.words\.peft\.decoder=null"):
        taken("experiment=scenes_smollm2", "pipeline=[words]", "peft.decoder.rank=4")
    with pytest.raises(ConfigError, match="peft=lora has no effect: stage contrastive has no decoder"):
        taken("pipeline=[contrastive]", "peft=lora")
    with pytest.raises(ConfigError, match="there is no part 'tower'"):
        check_config(taken("+peft.tower={rank: 4}")[0])
    found, told = taken("experiment=xcomposer_toy", "peft=none")
    assert all(not stage_settings(found, name).parts.peft for name in found["pipeline"])
    assert "peft=none in place of its own adapters on the decoder" in told[-1]
    found, _ = taken("experiment=xcomposer_toy", "peft=lora", "peft.decoder.rank=4")
    assert {stage_settings(found, n).parts.peft["decoder"]["rank"] for n in found["pipeline"]} == {4}
    found, _ = taken("quantization=nf4", "++stages.supervised.quantization={encoder: bf16}", "quantization.encoder=int8")
    assert stage_settings(found, "supervised").parts.quantization == {"encoder": "bf16", "decoder": "nf4"}


def test_settings_of_parts_data_and_blocks() -> None:
    found, _ = taken("experiment=internvl", "encoder.drop_path=0.5", "data.processor.image_size=112", "compile=true")
    assert stage_settings(found, "contrastive").parts.encoder["drop_path"] == 0.5
    assert found["stages"]["alignment"]["collate"]["processor"]["image_size"] == 112
    found, _ = taken("experiment=llava_toy", "middleware.dim=64", "data.chats.turns=3", "data.chats_collate.template=chatml")
    assert "dim" not in stage_settings(found, "alignment").parts.middleware  # which is of another class
    assert found["stages"]["alignment"]["datasets"]["chats"]["turns"] == 3
    assert found["stages"]["alignment"]["collate"]["template"] == "chatml"
    found, told = taken("compile=false", "+stages.generative.compile=eager", "activation_checkpointing=full")
    assert stage_settings(found, "generative").compile == dict.fromkeys(("encoder", "middleware", "decoder"), "eager")
    config = composed("compile=false")
    config["stages"]["generative"]["compile"] = "eager"
    found, told = with_given(config, given_settings(["compile=false"]))
    assert not any(stage_settings(found, "generative").compile.values())
    assert told[0].startswith("generative: compile.encoder False in place of eager")


def test_what_can_have_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr=1e-3 has no effect: pipeline=\[filter\] trains nothing"):
        taken("pipeline=[filter]", "optimizer.lr=1e-3")
    probe = ["experiment=internvl_probe_toy", "pipeline=[probe]", "optimizer.betas=[0.5,0.6]"]
    with pytest.raises(
        ConfigError, match=r"betas=\[0\.5,0\.6\] has no effect: stage probe has sgd as its optimizer, with lr, mom"
    ):
        taken(*probe)


def test_a_setting_is_given_once(tmp_path: Path) -> None:
    shards = [f"data.shards=/d/{n:03}.tar" for n in range(4)]
    with pytest.raises(ConfigError, match=r"data\.shards is given 4 times \(data\.shards=/d/000\.tar .*quotes"):
        check_given_once(given_settings(["data=webdataset", *shards]))
    with pytest.raises(ConfigError, match=r"optimizer\.lr is given 2 times"):
        check_given_once(given_settings(["optimizer.lr=1", "++optimizer.lr=2"]))
    check_given_once(
        given_settings(["optimizer=sgd", "optimizer.lr=1", "optimizer@stages.probe.optimizer=sgd", "seed=0,1", "~seed"])
    )
    outcome = call("train.py", "--cfg", "job", "-p", "data.shards", "data=webdataset", *shards)
    assert outcome.code == 2
    assert "data.shards is given 4 times" in outcome.err
    assert call("evaluate.py", f"run={tmp_path}", "seed=1", "seed=2").code == 2


# --- runs -----------------------------------------------------------------------------------------------------------

ONE = ("pipeline=[contrastive]", "logger=[history]", "max_steps=3")


def test_a_rate_of_the_command_line_is_that_of_the_run(tmp_path: Path) -> None:
    runs = {rate: tmp_path / rate for rate in ("1e-9", "1")}
    for rate, folder in runs.items():
        outcome = train(*TINY, *ONE, f"optimizer.lr={rate}", f"paths.run={folder}")
        assert outcome.code == 0, outcome.err
        assert f"contrastive: optimizer.lr {float(rate):g} in place of 0.001" in outcome.out
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["stages"]["contrastive"]["optimizer"]["lr"] == float(rate)
        assert config["stages"]["contrastive"]["max_steps"] == 3
    assert losses(runs["1e-9"], "contrastive") != losses(runs["1"], "contrastive")
    resumed = train(f"resume={runs['1']}")
    assert resumed.code == 0, resumed.err


def test_the_jobs_of_a_sweep_differ(tmp_path: Path) -> None:
    outcome = train("--multirun", *TINY, *ONE, "optimizer.lr=1e-3,1e-4", f"paths.sweep={tmp_path}")
    assert outcome.code == 0, outcome.err
    first, second = (losses(tmp_path / job, "contrastive") for job in ("0", "1"))
    assert json.dumps(first[-1]) != json.dumps(second[-1])


def test_a_recipe_of_ones_own_sets_a_rate_for_all_stages(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer: {lr: 0.125}\n")
    words = ("--config-dir", str(tmp_path / "conf"), *TINY, "experiment=mine", "plan=true", "pipeline=[contrastive]")
    outcome = train(*words, f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "contrastive: optimizer.lr 0.125 of the recipe in place of 0.001" in outcome.out


OWN = ("data=conversations", "data.path=a.jsonl", "pipeline=[supervised]")
EVERY = "callbacks.tracking.every_n_steps=9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*OWN, EVERY], r"every_n_steps=9 has no effect: nothing is held out of this data; give data\.validation=0\.1"),
        ([EVERY, "data.held_out=null"], "has no effect: this data has no held-out records"),
        ([EVERY, "data=webdataset", "data.shards=a.tar"], "has no effect: this data has no held-out records"),
        (["callbacks.tracking.samples=20"], r"samples=20 has no effect: .*; give callbacks\.tracking\.every_n_steps=N"),
        ([EVERY, "callbacks.tracking.patience=2"], r"patience=2 has no effect: .*; give callbacks\.tracking\.best=METRIC"),
        ([*OWN, EVERY, "data.validation=0.1"], ""),
        ([EVERY, "callbacks.tracking.samples=20"], ""),
        (["callbacks.tracking.every_n_steps=null", "callbacks.samples.images=2"], ""),
        (["experiment=finetune", "init_from=owner/name", "callbacks.tracking.patience=2"], ""),
    ],
    ids=str,
)
def test_tracking_has_something_to_measure_on_or_is_refused(words: list[str], said: str) -> None:
    if not said:
        taken(*words)
        return
    with pytest.raises(ConfigError, match=said):
        taken(*words)
