"""Every file of the groups of `conf/` that a user swaps with one word: it passes the checks of
settings, or is refused with a reason before PyTorch is imported; toys of all kinds train."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from runs import ROOT, train

from lightning_internvl.cli import CONF, explain, given_settings
from lightning_internvl.config.checks import check_config
from lightning_internvl.config.given import with_place
from lightning_internvl.config.overrides import with_given
from lightning_internvl.messages import ConfigError

RECIPES = ("internvl_toy", "clip_toy", "llava_toy", "blip2_toy")
GROUPS = (
    "encoder", "middleware", "decoder", "objective", "processor", "data", "optimizer", "scheduler",
    "peft", "quantization",
)  # fmt: skip
FITS = ("give ", "choose", "valid choices", "leave", "comes with", "stages with one")  # what a refusal says of what does


def files_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*words: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*words, "debug=fast", "paths.run=unused"])


def swapped(recipe: str) -> Iterator[tuple[str, Any]]:
    """Each word, and the configuration with it until the next one. One composition has a file of every group, of which each
    is put into the recipe's own in its turn."""
    config = composed(f"experiment={recipe}")
    whole = "data", "objective"  # which change more than a node of their own
    for group in whole:
        for file in files_of(group):
            yield f"{group}={file}", composed(f"experiment={recipe}", f"{group}={file}")
    groups = {group: files_of(group) for group in GROUPS if group not in whole}
    for files in itertools.zip_longest(*groups.values()):
        words = {group: with_place(f"{group}={file}") for group, file in zip(groups, files, strict=True) if file}
        together = composed(f"experiment={recipe}", *words.values())
        for group, word in words.items():
            place, source = (one["data"] if group == "processor" else one for one in (config, together))
            own, place[group] = place[group], source[group]
            yield word, config
            place[group] = own


def refusal(word: str, config: Any) -> str | None:
    """What is said of a swap; None where it passes."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_config(with_given(plain, given_settings([word]))[0])
    except (ConfigError, OmegaConfBaseException) as error:
        return explain(error)
    return None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_word_swaps_or_is_refused_with_what_fits(recipe: str) -> None:
    said = {word: refusal(word, config) for word, config in swapped(recipe)}
    assert len(said) == sum(len(files_of(group)) for group in GROUPS)
    for group in GROUPS:
        passed = [word for word, reason in said.items() if reason is None and word.startswith(group)]
        assert passed or (recipe, group) == ("clip_toy", "decoder"), group  # CLIP has none
    for word, reason in said.items():
        assert reason is None or any(fitting in reason for fitting in FITS), (word, reason)


RESAMPLED = "pipeline=[supervised]", "middleware@stages.supervised.middleware=perceiver_resampler"
NEW_PROCESS = """
import sys
sys.modules["torch"] = None  # an import of it would fail
sys.argv = ["train.py", *sys.argv[1:]]
import runpy
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["experiment=clip_toy", "encoder=sam_toy"], "SamViT puts no token before its patches"),
        (["middleware=mlp"], "stages.contrastive, stages.generative: middleware MLPConnector"),
        ([*RESAMPLED, "decoder=vicuna_7b"], "width 128, and decoder HFCausalLM reads tokens of width 4096"),
    ],
)
def test_a_refusal_needs_no_pytorch(words: list[str], reason: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", NEW_PROCESS, *words, f"paths.run={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, reason in done.stderr) == (2, True), done.stderr


TINY = (
    "debug=fast",
    "max_steps=2",
    "data.held_out={scenes: 12, questions: 4, single: 48}",
    "callbacks.samples.images=2",
)


@pytest.mark.parametrize(
    "words",
    [
        "experiment=clip_toy encoder=eva_vit_toy",
        "experiment=clip_toy objective=siglip optimizer=sgd scheduler=constant",
        "experiment=llava_toy encoder=siglip_vit_toy decoder=flamingo_toy decoder.config.hidden_size=64",
        "experiment=llava_toy decoder=qwen_toy peft=dora",
        "experiment=blip2_toy decoder=llama_toy processor=tiles",
        "pipeline=[contrastive,generative] encoder=sam_toy quantization=int8",
    ],
)
def test_swapped_toys_train_all_their_stages(words: str, tmp_path: Path) -> None:
    outcome = train(*words.split(), *TINY, f"paths.run={tmp_path}/run")
    assert outcome.code == 0, outcome.err


def given_to_a_recipe(recipe: str, *words: str) -> tuple[Any, list[str]]:
    """`with_given` for words beside `experiment=RECIPE`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = OmegaConf.to_container(compose("config", overrides=[f"experiment={recipe}", *words]), resolve=True)
    own: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"experiment/{recipe}.yaml"), resolve=False)
    return with_given(plain, given_settings(words), own)


@pytest.mark.parametrize("middleware", ["linear", "perceive_sampler_toy"])
def test_what_a_recipe_says_for_another_middleware_of_a_stage_is_left_out(middleware: str) -> None:
    found, lines = given_to_a_recipe("blip2_toy", f"middleware@stages.supervised.middleware={middleware}", "plan=true")
    assert lines[0].startswith("stages.supervised.middleware: without text")
    check_config(found)


def test_what_a_recipe_says_for_other_data_is_left_out() -> None:
    words = ["data=conversations", "data.path=captions.jsonl", "plan=true"]
    found, lines = given_to_a_recipe("blip2_toy", *words)
    assert lines[0].startswith("data.chats: without turns, caption_share, layout_share of the recipe")
    check_config(found)
    with pytest.raises(ConfigError, match=r"data\.chats: there is no setting 'turns'"):  # of the command line's own
        check_config(given_to_a_recipe("blip2_toy", *words, "data.chats.turns=2")[0])
