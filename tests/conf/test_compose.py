"""Every YAML of `conf/` composes, and what it names exists and takes the settings that it is given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lightning_internvl.choices import INHERITED
from lightning_internvl.cli import CONF, given_settings
from lightning_internvl.config import checks
from lightning_internvl.config.checks import KEYS, check_config
from lightning_internvl.config.given import with_place
from lightning_internvl.config.known_keys import variables_of
from lightning_internvl.config.strangers import leave_out_strangers
from lightning_internvl.config.targets import check_arguments, locate, parameters_of
from lightning_internvl.evaluation.settings import check_settings

TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))  # of evaluate.yaml
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml") if path.parent.name != "task")
GROUPS = (
    "callbacks", "data", "debug", "decoder", "encoder", "experiment", "logger", "middleware", "objective", "optimizer",
    "paths", "peft", "peft/part", "processor", "quantization", "scheduler", "stage", "strategy", "trainer",
)  # fmt: skip
COMPLETED_LATER = {"tokenizer"}  # read by the composition of the model, not by the part
FOLDER = CONF.parent / "tests/fixtures/hf/clip"  # of a tower, where a command names one
NEEDED = {
    "encoder/hf": [f"encoder.pretrained={FOLDER}"],
    "encoder/hf_naflex": [f"encoder.pretrained={FOLDER}"],
    "processor/hf": ["encoder=hf", f"encoder.pretrained={FOLDER}"],
    "decoder/hf": ["decoder.pretrained=folder"],
    "experiment/finetune": ["init_from=owner/name"],
    "experiment/transplant": ["init_from=owner/name"],
    "encoder/inherited": ["experiment=transplant", "init_from=owner/name"],
    "decoder/inherited": ["experiment=transplant", "init_from=owner/name"],
    "processor/inherited": ["experiment=finetune", "init_from=owner/name"],
    "data/image_folder": [
        "experiment=internvl_probe_toy",
        "pipeline=[probe]",
        "data.path=train",
        "data.eval_path=val",
        "data.classes=10",
    ],
    "data/own": [
        f"+data.{kind}._target_=lightning_internvl.data.files.datasets.{kind.title()}File" for kind in ("pairs", "chats")
    ],
    "data/webdataset": ["data.shards=FOLDER", "plan=true"],  # for which no shard is looked for
}
DEFAULT_STAGES = ("contrastive", "generative", "words", "supervised", "filter")


def composed(*overrides: str) -> DictConfig:
    tower = "encoder.pretrained=FOLDER_OR_ID"
    words = [f"encoder.pretrained={FOLDER}" if word == tower else with_place(word) for word in overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=words)


def settled(*overrides: str) -> dict[str, Any]:
    """What a run has of these words: without what the default says of data that another choice does not know."""
    plain = OmegaConf.to_container(composed(*overrides), resolve=True)
    list(leave_out_strangers(plain, given_settings(map(with_place, overrides)), {}, plain["pipeline"]))
    return plain


def overrides_of(file: str) -> list[str]:
    """The words on the command line that choose a file of `conf/`."""
    group, _, option = file.rpartition("/")
    chosen = {"": [], "stage": [f"stage@stages.{option}={option}"], "middleware": []}.get(group, [f"{group}={option}"])
    if group == "middleware":  # both for all stages, and for one alone
        chosen = [f"middleware={option}", f"middleware@stages.supervised.middleware={option}"]
    if group == "stage" and option not in DEFAULT_STAGES:
        chosen = [f"+stage@stages.{option}={option}"]
    if group == "peft/part":
        chosen = ["peft=lora", f"peft/part@peft.decoder={option}"]
    if group == "logger":
        chosen = [f"logger=[{option}]"]
    if group == "processor":
        chosen = [f"processor@data.processor={option}"]
    return chosen + NEEDED.get(file, [])


def data_of(file: str) -> str:
    """The file of the data group that is composed with a file of `conf/`."""
    group, _, option = file.rpartition("/")
    recipe = yaml.safe_load((CONF / f"{file}.yaml").read_text()) if group == "experiment" else {}
    chosen = [word["override /data"] for word in recipe.get("defaults", ()) if "override /data" in word]
    return option if group == "data" else next(iter(chosen), "scenes" if group == "experiment" else "scenes_single_turn")


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings with a `_target_`, at any depth."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for child in value.values():
            yield from nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from nodes(child)


@pytest.mark.parametrize("file", FILES)
def test_it_composes_and_is_valid(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "fit_faults", lambda *_, **__: ())  # tests/conf/test_swaps.py sees what fits
    config = composed(*overrides_of(file))
    assert not OmegaConf.missing_keys(config)
    plain = settled(*overrides_of(file))
    check_config(plain, variables_of(OmegaConf.to_container(config), data_of(file)))
    assert set(plain) == set(KEYS)
    found = list(nodes(plain))
    assert len(found) > 20
    if file.startswith("experiment/"):
        assert plain["name"] == file.removeprefix("experiment/")
    own = yaml.safe_load((CONF / f"{file}.yaml").read_text()) or {}
    named = {node["_target_"] for node in nodes({key: value for key, value in own.items() if key != "hydra"})}
    # an override that does not reach the file would leave no trace of it
    assert named <= {node["_target_"] for node in nodes(OmegaConf.to_container(config))}
    for node in found:
        if node["_target_"] == INHERITED:  # takes its place from the checkpoint
            continue
        check_arguments({key: value for key, value in node.items() if key not in COMPLETED_LATER})


def test_every_group_has_its_words_on_the_command_line() -> None:
    assert {file.rpartition("/")[0] for file in FILES} == {"", *GROUPS}
    assert not [path for path in CONF.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {group.partition("/")[0] for group in (*GROUPS, "task")}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_compose_under_their_own_name(task: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composition = compose("evaluate", [f"task=[{task}]", f"run={CONF.parent / 'docs'}"])
    plain = OmegaConf.to_container(composition, resolve=True, throw_on_missing=True)
    assert list(plain["task"]) == [task]
    check_settings(plain)
    check_arguments(plain["task"][task])


def test_documented_evaluations_name_settings_that_there_are() -> None:
    """Every `python evaluate.py ...` in the documentation, the comments of `conf/` and the script."""
    files = [CONF.parent / "evaluate.py", *CONF.parent.glob("docs/*.md"), *CONF.rglob("*.yaml")]
    text = "".join(re.sub(r"\\\n#? *", " ", file.read_text()) for file in files)  # commands of several lines
    commands = re.findall(r"python evaluate\.py(?! --config-dir)([^|`\n]*)", text)  # whose tasks are the reader's own
    words = {word for command in commands for word in re.findall(r"([\w.]+)=(\S+)", command.partition(" #")[0])}
    assert len(words) > 30
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composition = compose("evaluate", [f"task=[{','.join(TASKS)}]"])
    for name, value in words:
        if name == "task":
            assert set(re.findall(r"\w+", value)) <= set(TASKS)
        node = composition
        for key in name.split("."):
            assert key in node, f"{name}={value}"
            node = node._get_node(key)


def documented_commands() -> list[tuple[str, ...]]:
    """Overrides of every `python train.py ...` in the README, the comments of `conf/` and the script; of a sweep, of one job."""
    files = [CONF.parent / "README.md", CONF.parent / "train.py", *CONF.rglob("*.yaml")]
    found = {match for file in files for match in re.findall(r"python train\.py([^#|`\n]*)", file.read_text())}
    # of the reader's own folder, and of the shell
    found = [match for match in found if "--config-dir" not in match and "-sc" not in match]
    words = [[word for word in re.findall(r"'[^']*'|\S+", match) if "=" in word] for match in found]
    return sorted(
        {tuple(word.strip("'") if word[0] == "'" or "[" in word else word.partition(",")[0] for word in one) for one in words}
    )


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_documented_commands_compose(command: tuple[str, ...]) -> None:
    plain = settled(*command)
    check_config({**plain, "init_from": plain["init_from"] and "owner/name", "resume": None, "plan": True})  # reads no data


def test_the_signature_check_sees_a_wrong_word() -> None:
    stage = {"_target_": "lightning_internvl.stages.GenerativeStage", "train": ["*"], "negativs": "mined"}
    with pytest.raises(ValueError, match=r"does not know negativs; valid choices: .*negatives.*seed"):
        check_arguments(stage)
    with pytest.raises(ValueError, match=r"'lightning_internvl\.nothing\.Here' cannot be found"):
        locate("lightning_internvl.nothing.Here")


def test_settings_that_a_class_passes_on_to_its_base_class_are_known() -> None:
    parameters, anything = parameters_of("lightning_internvl.stages.ContrastiveStage")
    assert {"keep_tokens", "train", "max_steps"} <= set(parameters)
    assert not anything
    assert parameters_of("lightning.pytorch.strategies.DDPStrategy")[1]
