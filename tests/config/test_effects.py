"""Each setting of a configuration, given on a command line, changes what a stage of the run is made with, or is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from runs import TINY, call, tiny_run

from lightning_internvl.choices import INHERITED
from lightning_internvl.cli import CONF, given_settings
from lightning_internvl.config.checks import check_config
from lightning_internvl.config.given import VALUE, Given
from lightning_internvl.config.known_keys import variables_of
from lightning_internvl.config.overrides import with_given
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.shapes import MAPPINGS, check_shapes
from lightning_internvl.messages import ConfigError
from lightning_internvl.training.inherit import inherit

OF_THE_COMMAND = {"name", "resume", "trust", "plan", "doctor", "paths.root", "paths.run", "paths.sweep"}  # no stage reads them
OTHERS: dict[type, tuple[Any, ...]] = {  # of which at least one is another value than any file has
    bool: (False, True), int: (3, 77), float: (0.011, 0.75), str: ("other", "math", "full", "dora"),
    type(None): (7, "other", True, 0.5, "full", {"where": "memory", "gib": 2}), list: (["other"], []), dict: ({"x": 1},),
}  # fmt: skip


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(words))


def leaves(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def made_with(plain: dict[str, Any], *given: Given) -> dict[str, Any]:
    """What the stages of a run are made with, as `train.py` finds it."""
    check_shapes(plain)
    plain, _ = with_given(plain, given)
    if any(plain["stages"][name]["parts"] == INHERITED for name in plain["pipeline"]):
        plain = inherit(plain)
    run = RunSettings.of(plain)
    stages = {name: dataclasses.asdict(one) for name, one in run.stages.items()}
    return {"stages": stages, "init_from": run.init_from, "attention": run.attention}


def changed(plain: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(plain)
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return found


def referred(config: DictConfig, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The same where other settings may refer to this one."""
    found = copy.deepcopy(config)
    OmegaConf.set_struct(found, False)
    OmegaConf.update(found, ".".join(path), value, merge=False)
    return OmegaConf.to_container(found, resolve=True)


def effects(words: tuple[str, ...]) -> dict[str, str]:
    """Of each setting: `changed`, `nothing`, or why it is refused."""
    config = composed(*words)
    plain = OmegaConf.to_container(config, resolve=True)
    variables = variables_of(OmegaConf.to_container(config, resolve=False), "scenes")
    before, found = made_with(plain), {}
    for path in leaves(plain):
        setting, value = ".".join(path), OmegaConf.select(config, ".".join(path))
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        outcomes = []
        for other in [one for one in OTHERS[type(value)] if one != value]:
            given = Given(path, other, VALUE, f"{setting}={other}")
            new = changed(plain, path, other)
            try:
                if made_with(new, given) != before:
                    told = "changed"
                else:
                    check_config(new, variables)
                    told = "changed" if made_with(referred(config, path, other), given) != before else "nothing"
            except ConfigError as error:
                told = str(error)
            except (TypeError, ValueError, AttributeError, KeyError):  # `train.py` checks before it makes anything
                with pytest.raises(ConfigError) as refused:
                    check_config(new, variables)
                told = str(refused.value)
            outcomes.append(told)
            if told == "changed":
                break
        found[setting] = next((one for one in outcomes if one in ("changed", "nothing")), outcomes[0])
    return found


def test_every_setting_of_the_default_recipe_has_an_effect_or_is_refused() -> None:
    found = effects(())
    assert {name for name, outcome in found.items() if outcome == "nothing"} == OF_THE_COMMAND
    assert sum(outcome == "changed" for outcome in found.values()) > 220
    for name, outcome in found.items():
        if outcome not in ("changed", "nothing"):
            assert name.rpartition(".")[2].lstrip("@") in outcome, (name, outcome)


def test_every_setting_of_a_fine_tune_has_an_effect_or_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "logger=[]")
    (tmp_path / "chats.jsonl").write_text("")
    found = effects(("experiment=finetune", f"init_from={run}", f"data.path={tmp_path}/chats.jsonl"))
    read_through = {"encoder.pretrained", "decoder.pretrained"}  # init_parts, which takes them over before this looks
    assert {name for name, outcome in found.items() if outcome == "nothing"} == OF_THE_COMMAND | read_through
    assert found["peft.decoder.rank"] == found["data.validation"] == "changed"
    assert "does not run contrastive" in found["stages.contrastive.max_steps"]


@pytest.mark.parametrize("value", [1, "x", [1]])
def test_no_value_takes_the_place_of_a_group(value: Any) -> None:
    config = OmegaConf.to_container(composed(), resolve=True)
    for pattern in [one for one in MAPPINGS if "*" not in one and one not in ("encoder", "middleware")]:
        group, _, name = pattern.partition(".")
        if config[group].get(name, config) is not None:
            with pytest.raises(ConfigError, match="holds settings"):
                check_shapes(changed(config, tuple(pattern.split(".")), value))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("lr=1e-4", "there is no setting 'lr'; did you mean optimizer.lr?"),
        ("+lr=1e-4", "did you mean optimizer.lr?"),
        ("optimizer.learning_rate=1", "did you mean optimizer.lr?"),
        ("trainer.gpus=2", "did you mean trainer.devices?"),
        ("output_dir=x", "did you mean paths.run?"),
        ("stages.filter.batch_size=3", "does not run filter; name it there, or leave this out"),
        ("callbacks.validation.samples=9", "this data has no held-out records; data of files has, with data.validation=0.1"),
        ("data=conversations data.path=x callbacks.validation.shown=1 data.validation=null", "nothing is held out of this data"),
        ("device_memory=40", "it is for plan=true"),
        ("price_per_hour=2", "price_per_hour=2 has no effect: it is for plan=true"),
        (
            "pipeline=[contrastive] decoder.embed_std=1",
            "has a decoder; stages with one: supervised, preference, reward, embed, words",
        ),
        (
            "pipeline=[contrastive] data.packing=true",
            "reads chats; stages that do: supervised, preference, reward, words",
        ),
        ("pipeline=[filter] batch_size=3", "trains nothing; name a stage that does"),
        ("init_from=3", "init_from=3: init_from must be a text"),
        ("peft.encoder=1", "peft.encoder holds settings"),
        ("data.processor=null", "data.processor=null: no run is without"),
    ],
)
def test_what_has_no_effect_is_answered(word: str, told: str, tmp_path: Path) -> None:
    outcome = call("train.py", *word.split(), f"paths.run={tmp_path}/run")
    assert outcome.code == 2
    assert told in outcome.err, outcome.err


def test_a_batch_size_is_that_of_every_stage_or_of_those_a_recipe_does_not_name() -> None:
    sizes = "batch_size=8", "stages.supervised.batch_size=2"
    plain = OmegaConf.to_container(composed(*sizes), resolve=True)
    found, told = with_given(plain, given_settings(sizes))
    assert [found["stages"][name]["batch_size"] for name in found["pipeline"]] == [8, 8, 8, 2]
    replaced = {"contrastive": 64, "generative": 32, "words": 64}
    assert told == [f"{name}: batch_size 8 in place of {size}" for name, size in replaced.items()]
    recipe = {"batch_size": 8, "stages": {"supervised": {"batch_size": 2}}}
    assert with_given(plain, [], recipe)[0]["stages"] == found["stages"]


def test_fsdp_means_fsdp2(tmp_path: Path) -> None:
    outcome = call("train.py", *TINY, "strategy=fsdp", "pipeline=[contrastive]", "plan=true", f"paths.run={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "strategy=fsdp is FSDP2 here" in outcome.out
    assert "(FSDP2, sharded)" in outcome.out
