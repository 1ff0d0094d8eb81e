"""Of a folder nothing is executed, built or fetched but this project's own, unless the user names it: at every door."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT, TINY, call, tiny_run, train

from lightning_internvl.checkpoints import handoff, load_handoff
from lightning_internvl.config import trust
from lightning_internvl.config.trust import Untrusted, check_folder, check_run, trusting

ONE_STAGE = ("pipeline=[contrastive]", "callbacks.report=null", "callbacks.samples=null")
PLANTED = "from pathlib import Path\nPath({ran!r}).touch()\nfrom os import system\ndef build(*_, **__): return 1\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of one stage."""
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", *ONE_STAGE)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the package `planted` makes when it is imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted.py").write_text(PLANTED.format(ran=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path / "ran"
    sys.modules.pop("planted", None)


def with_setting(node: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value


def edit_run(run: Path, path: str, value: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    with_setting(config, path, value)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def edit_manifest(run: Path, path: str, value: Any) -> None:
    file = run / "handoff" / "contrastive" / "manifest.json"
    manifest = json.loads(file.read_text())
    with_setting(manifest, path, value)
    file.write_text(json.dumps(manifest))


def doors(run: Path, to: Path) -> dict[str, tuple[str, ...]]:
    """Every command that opens a run."""
    return {
        "chat": ("chat.py", f"run={run}", "question=hi", f"gallery={run}"),
        "evaluate": ("evaluate.py", f"run={run}", f"to={to / 'scores'}"),
        "export": ("export.py", f"run={run}", f"to={to / 'exported'}"),
        "resume": ("train.py", f"resume={run}"),
        "init_from": ("train.py", *TINY, *ONE_STAGE, f"init_from={run}", f"paths.run={to / 'new'}"),
    }


NODE = {"_target_": "planted.build"}
PLACES: list[tuple[str, Any]] = [
    ("data.processor", NODE),
    ("data.eval_processor", NODE),
    ("data.held_out", NODE),
    ("data.pairs", {"_target_": "lightning_internvl.data.order.mixture.Mixture", "parts": [{"x": [NODE]}]}),
    ("data.processor.mean", {"_target_": "builtins.list", "_args_": [[NODE]]}),
    ("stages.contrastive.collate", {"processor": {"_partial_": True, **NODE}}),
    ("stages.contrastive.module", {"train": [NODE]}),
    ("stages.contrastive.evaluation", {"mine": NODE}),
    ("stages.filter.rules.mine", NODE),
    ("callbacks.mine", NODE),
    ("logger.mine", NODE),
    ("strategy", NODE),
    ("encoder", NODE),
    ("trainer", {"_target_": "lightning.Trainer", "plugins": [NODE]}),
    ("optimizer", NODE),
]


@pytest.mark.parametrize(("path", "value"), PLACES, ids=[path for path, _ in PLACES])
def test_a_target_from_elsewhere_is_refused_by_name_wherever_it_stands(path: str, value: Any, run: Path, ran: Path) -> None:
    edit_run(run, path, value)
    with pytest.raises(Untrusted, match=re.escape(f"{run}: {path}") + r".*'planted\.build' comes with .*trust=\[planted\]"):
        check_folder(run)
    assert not ran.exists()
    assert "planted" not in sys.modules


# A run that goes on reads no configuration from its hand-offs.
DOORS = ["chat", "evaluate", "export", "init_from"]
OPENED = [(door, place) for door in DOORS for place in ("data.processor", "manifest")] + [("resume", "data.processor")]


@pytest.mark.parametrize(("door", "place"), OPENED)
def test_no_command_opens_it(door: str, place: str, run: Path, ran: Path, tmp_path: Path) -> None:
    if place == "manifest":
        edit_manifest(run, "config.encoder", NODE)
    else:
        edit_run(run, place, NODE)
    edit_run(run, "trust", ["planted"])  # what the folder says of itself does not count
    outcome = call(*doors(run, tmp_path)[door])
    assert outcome.code == 2, outcome
    assert "'planted.build' comes with the" in outcome.err
    assert "trust=[planted]" in outcome.err
    assert not ran.exists()


@pytest.mark.parametrize("command", ["chat.py run={} question=hi", "evaluate.py run={}", "export.py run={} to={}/x"])
def test_it_is_refused_before_pytorch_is_imported(command: str, run: Path) -> None:
    edit_run(run, "data.processor", NODE)
    script, *words = command.format(run, run).split()
    code = (
        f"import sys, runpy; sys.argv = {[script, *words]!r}\ntry: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.split()[-2:] == ["2", "False"], found


@pytest.mark.parametrize(
    "target",
    [
        "lightning_internvl.files.os.system",
        "lightning_internvl.checkpoints.pretrained.torch.hub.load",
        "lightning_internvl.config.targets.build",
        "lightning_internvl.cli.hydra.utils.instantiate",
        "lightning_internvl.config.targets.locate",
        "lightning_internvl.layers.peft.import_module",
        "lightning_internvl.files.write_text",
        "lightning_internvl.data.processors.basic.Processor.__init__",
        "lightning_internvl.decoders.hf_causal.AutoModelForCausalLM",
        "lightning_internvl.nothing.Here",
        "callbacks.handoff.L.Trainer",
        "callbacks.os.system",
        "lightning_internvl_more.Thing",
        "hydra.utils.instantiate",
        "hydra.utils.get_method",
        "lightning.Trainer.fit",
        "lightning.pytorch.loggers.CSVLogger",
        "builtins.eval",
        "os",
        "",
        ["os.system"],
        {"a": 1},
        None,
        7,
    ],
)
def test_what_only_passes_by_this_project_is_not_its_own(target: Any, run: Path) -> None:
    edit_run(run, "data.processor", {"_target_": target})
    with pytest.raises(Untrusted, match=r"data\.processor\._target_: .* comes with the run and is no part of lightning_internvl"):
        check_folder(run)


def test_an_interpolation_makes_no_target(run: Path) -> None:
    edit_run(run, "data.held_out.seed", "${oc.decode:'{_target_: planted.build}'}")
    with pytest.raises(Untrusted, match=r"data\.held_out\.seed: .* is an interpolation; it is not followed"):
        check_folder(run)
    outcome = train(f"resume={run}")
    assert outcome.code == 2
    assert "is an interpolation" in outcome.err


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("data.processor", "lightning_internvl.data.tokenizer.hf_tokenizer"),
        ("data.held_out", "lightning_internvl.data.shards.tables.HfShards"),
    ],
)
def test_what_reads_data_is_no_processor_and_no_held_out_data(path: str, target: str, run: Path, tmp_path: Path) -> None:
    edit_run(run, path, {"_target_": target, "pretrained": "owner/name", "path": "owner/name"})
    for door in ("chat", "evaluate", "export"):
        outcome = call(*doors(run, tmp_path)[door])
        assert outcome.code == 2
        assert f"{path}._target_: '{target}' comes with the run and is none of" in outcome.err


def test_conf_is_covered() -> None:
    named = trust.named_in_conf()
    foreign = {target for target in named if not target.startswith(("lightning_internvl.", "callbacks."))}
    assert foreign == {
        "lightning.Trainer", "lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.strategies.DDPStrategy",
    }  # fmt: skip
    assert len(named) > 80
    for target in sorted(named - foreign):
        assert trust._is_ours(target), target
    texts = [file.read_text() for file in (ROOT / "conf").rglob("*.yaml")]
    every = {target for text in texts for target in re.findall(r"_target_: *['\"]?([^\s,}'\"]+)", text)}
    assert every - named == {"inherited", "package.Class", "package.function"}  # the last two are examples in comments


def test_a_trusted_package_is_run_but_not_what_it_has_imported(run: Path, ran: Path) -> None:
    edit_run(run, "callbacks.mine", NODE)
    config = yaml.safe_load((run / "config.yaml").read_text())
    with trusting(["planted"]):
        check_run(config, run)
    assert ran.exists()
    with trusting(["plant"]), pytest.raises(Untrusted, match=r"trust=\[planted\]"):
        check_run(config, run)
    edit_run(run, "callbacks.mine._target_", "planted.system")
    with trusting(["planted"]), pytest.raises(Untrusted, match=r"'planted\.system' is defined in posix"):
        check_folder(run)


@pytest.mark.parametrize("word", ["trust=mine", "trust=[3]", "trust=['a b']"])
def test_trust_is_a_list_of_names(word: str, run: Path, tmp_path: Path) -> None:
    for command in doors(run, tmp_path).values():
        outcome = call(*command, word)
        assert outcome.code == 2, command
        assert "must be a list" in outcome.err, command


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base", {"place": "owner/name", "fingerprint": "id:owner/name", "names": []}),
        ("base", {"place": "gpt2", "fingerprint": "id:gpt2", "names": []}),
        ("config.middleware.tokenizer", {"_target_": handoff.SAVED, "folder": "owner/name"}),
    ],
)
def test_a_hub_id_of_a_manifest_is_fetched_only_if_the_user_names_it(
    path: str, value: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lightning_internvl.hub._downloaded", lambda place: asked.append(place))
    edit_manifest(run, path, value)
    place = value.get("place") or value["folder"]
    for door in ("chat", "evaluate", "export", "init_from"):
        outcome = call(*doors(run, tmp_path)[door])
        assert outcome.code == 2, door
        assert f"'{place}' comes with the folder and is no folder on this machine" in outcome.err, door
        assert f"trust=[{place}]" in outcome.err
    with pytest.raises(ValueError, match="comes with the folder and is no folder on this machine"):
        load_handoff.load(run / "handoff" / "contrastive")
    assert not asked
    with trusting([place]):
        check_folder(run)


def test_a_run_that_goes_on_fetches_no_weights_that_the_user_has_not_named(run: Path) -> None:
    edit_run(run, "decoder.pretrained", "owner/name")
    outcome = train(f"resume={run}")
    assert outcome.code == 2
    assert "decoder.pretrained: 'owner/name' comes with the folder" in outcome.err
    resumed = train(f"resume={run}", "trust=[owner/name]")
    assert resumed.code == 0, resumed.err


def test_the_advice_to_go_on_says_what_the_run_asks_for(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    advice = f"stopped; go on with python train.py resume={run}"
    assert trust.with_trust(advice, config, run) == advice
    config["logger"]["mine"] = {"_target_": "planted.build", "tracking_uri": "http://host:5000/a", "file": "sqlite:///a.db"}
    assert trust.with_trust(advice, config, run) == f"{advice} trust=[http://host:5000,planted]"
