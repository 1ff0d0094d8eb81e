"""What a stage is made of: each input that may change its result is a piece, and what is free is known by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import TINY, fitting
from safetensors.torch import save_file
from torch import ones

from lightning_internvl.checkpoints.weight_source import state_of_weights
from lightning_internvl.config.consent import giving_parts
from lightning_internvl.config.stage_settings import StageSettings, stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.data.files.datasets import ChatsFile, PairsFile
from lightning_internvl.data.files.labelled_folder import FolderLabels, HeldOutFolder
from lightning_internvl.data.order.mixture import Mixture
from lightning_internvl.data.scene_shards import write_scene_shards
from lightning_internvl.data.scenes.datasets import ScenePairs
from lightning_internvl.data.shards.datasets import ShardPairs
from lightning_internvl.files import UnknownState, identity_of, write_json
from lightning_internvl.reuse import code, keep, key
from lightning_internvl.reuse.code import LIBRARIES, foreign_code
from lightning_internvl.reuse.keep import KEY, UNKNOWN, keyed, pieces_of
from lightning_internvl.reuse.key import made_of
from lightning_internvl.reuse.take import differing

OTHER: dict[type, Any] = {bool: True, int: 77, float: 0.011, str: "other", type(None): 7, list: ["other"], dict: {"x": 1}}
# Of the default recipe's settings those that leave its contrastive stage as it is,
FREE = (
    "name", "pipeline", "init_from", "init_parts", "reuse", "resume", "trust", "plan", "doctor", "objective_metric", "paths.",
    "device_", "price_per_hour", "logger.", "data.num_workers", "trainer.max_time", "trainer.enable_progress_bar",
    "trainer.enable_model_summary", "callbacks.throughput.", "callbacks.samples.", "callbacks.progress.", "callbacks.checkpoint.",
    # because the stage does not read them,
    "decoder.", "peft.decoder", "quantization.decoder", "data.chats", "data.labels.", "data.classes", "data.packing",
    "stages.generative.", "stages.words.", "stages.supervised.", "stages.preference.", "stages.reward.", "stages.embed.",
    "stages.filter.",
    # or because it reads them by other names: its own, those of what refers to them, or through its length
    "optimizer.lr", "scheduler.warmup_steps", "data.styles", "data.image_size", "epochs", "batch_size",
)  # fmt: skip


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from lightning_internvl.cli import CONF

    words = [word for word in fitting(TINY) if not word.startswith(("debug=", "callbacks.progress="))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=words), resolve=True)


def pieces(config: dict[str, Any], stage: str = "contrastive", source: Path | None = None) -> dict[str, Any]:
    return made_of(stage_settings(config, stage), config, source, build)


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with another value; what lies beside its path is the same object."""
    name, *rest = path
    return {**config, name: changed(config[name], tuple(rest), value) if rest else value}


def leaves(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def test_every_setting_is_a_piece_or_known_to_be_free(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "choose_backend", lambda name, *_: (name, ""))
    for name, value in {"foreign_code": {}, "library_versions": {}, "_state_of_data": None}.items():
        monkeypatch.setattr(key, name, lambda *_, value=value: value)
    before, same, unusable = pieces(config), set(), set()
    assert before == pieces(config)
    for path, value in leaves(config):
        other = OTHER[type(value)] if OTHER[type(value)] != value else False
        try:
            if pieces(changed(config, path, other)) == before:
                same.add(".".join(path))
        except (TypeError, ValueError):
            unusable.add(".".join(path))
    assert unusable == {"stages.contrastive.data"}
    assert not [name for name in same if not name.startswith(FREE)]
    assert not [name for name in FREE if not any(one.startswith(name) for one in same)]


def test_a_setting_that_nobody_has_heard_of_is_a_piece(config: dict[str, Any]) -> None:
    before = pieces(config)
    assert differing(before, pieces({**config, "brand_new": 1})) == ["brand_new is not set there, 1 here"]
    assert differing(before, pieces(changed(config, ("stages", "contrastive", "optimizer", "brand_new"), True)))


def test_of_a_stage_with_a_decoder_the_decoder_is_a_piece(config: dict[str, Any]) -> None:
    other = changed(config, ("decoder", "config", "num_hidden_layers"), 3)
    assert differing(pieces(config, "supervised"), pieces(other, "supervised")) == [
        "decoder.config.num_hidden_layers is 1 there, 3 here"
    ]
    assert pieces(config, "generative") == pieces(other, "generative")


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("own_code", lambda: "other", "the code of this project is another"),
        ("library_versions", lambda: {"torch": "1.0"}, 'the version of torch is "2.'),
        ("machine", lambda _: {"device": "another", "processes": 1, "threads": 1}, "the machine's device is "),
        ("machine", lambda _: {"device": "cpu", "processes": 2, "threads": 1}, "the machine's processes is 1 there, 2 here"),
        ("choose_backend", lambda *_: ("flash", ""), "attention in force is "),
    ],
)
def test_code_libraries_machine_and_attention_are_pieces(
    place: str, value: Any, says: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pieces(config)
    monkeypatch.setattr(key, place, value)
    assert any(line.startswith(says) for line in differing(before, pieces(config)))


def test_the_number_of_processes_is_a_piece(config: dict[str, Any]) -> None:
    other = changed(config, ("trainer", "devices"), 2)
    assert differing(pieces(config), pieces(other)) == [
        "trainer.devices is 1 there, 2 here",
        "the machine's processes is 1 there, 2 here",
    ]


def test_all_required_libraries_that_compute_are_compared() -> None:
    lines = (Path(__file__).parents[2] / "requirements.txt").read_text().splitlines()
    required = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    others = {"tensorboard", "hydra-core", "omegaconf", "pyyaml", "rich", "nvidia-cuda-runtime-cu12"}  # which compute nothing
    assert required - others <= set(LIBRARIES)


def test_1_and_true_are_two_values() -> None:
    assert differing({"a": 1, "b": 1}, {"a": True, "b": 1.0}) == ["a is 1 there, true here", "b is 1 there, 1.0 here"]


# --- data -------------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    for name in ("a", "b"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{name}.png")
    rows = [{"image": f"{name}.png", "caption": f"a {name}"} for name in ("a", "b")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno record\n")
    return folder / "pairs.jsonl"


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_records_count_by_their_bytes_and_pictures_by_their_times(tmp_path: Path) -> None:
    file = pictures(tmp_path)
    found = [PairsFile(file).identity()]
    touch(file)
    assert PairsFile(file).identity() == found[0]
    file.write_text(file.read_text().replace("a b", "a c"))
    found.append(PairsFile(file).identity())
    touch(tmp_path / "b.png")
    found.append(PairsFile(file).identity())
    (tmp_path / "a.png").unlink()
    found += [PairsFile(file).identity(), PairsFile(file, image_root=tmp_path.parent).identity()]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_conversations_count_with_their_pictures_and_videos(tmp_path: Path) -> None:
    pictures(tmp_path)
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a"}]
    film = [{"from": "human", "value": "<video>what?"}, {"from": "gpt", "value": "b"}]
    rows = [{"image": "a.png", "conversations": turns}, {"video": ["a.png", "b.png"], "conversations": film}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = ChatsFile(tmp_path / "chats.jsonl").identity()
    touch(tmp_path / "b.png")
    assert ChatsFile(tmp_path / "chats.jsonl").identity() != before


def test_a_folder_of_pictures_and_a_file_to_measure_on_count(tmp_path: Path) -> None:
    file, folder = pictures(tmp_path), tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "a.png").rename(folder / "a.png")
    (folder / "a.txt").write_text("one")
    before = PairsFile(folder).identity(), PairsFile(folder, validation=file).identity()
    file.write_text(file.read_text() + "\n")
    assert PairsFile(folder, validation=file).identity() != before[1]
    (folder / "a.txt").write_text("other")
    assert PairsFile(folder).identity() != before[0]


def test_classes_in_folders_count(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    pictures(tmp_path / "cat")
    found = [FolderLabels(tmp_path).identity(), HeldOutFolder(path=tmp_path, classes=1).identity()]
    touch(tmp_path / "cat" / "a.png")
    assert FolderLabels(tmp_path).identity() not in found
    assert found[0] == found[1]


def test_shards_count_by_their_times_and_urls_are_never_known(tmp_path: Path) -> None:
    write_scene_shards(tmp_path, pairs=4, per_shard=2, image_size=16)
    before = ShardPairs(str(tmp_path)).identity()
    touch(sorted(tmp_path.glob("*.tar"))[-1])
    assert ShardPairs(str(tmp_path)).identity() != before
    with pytest.raises(UnknownState, match="https://example"):
        ShardPairs("https://example.org/{0..9}.tar?sig=x").identity()

    class Mine:
        """Shards that say nothing of their files."""

        read = None

        def __len__(self) -> int:
            return 1

    with pytest.raises(UnknownState, match="Mine has no identity"):
        ShardPairs(Mine()).identity()


def test_a_mixture_is_known_by_all_its_datasets(tmp_path: Path) -> None:
    file, scenes = pictures(tmp_path), ScenePairs(0, "train", 16, length=4)
    before = identity_of(Mixture({"scenes": scenes, "own": PairsFile(file)}))
    file.write_text(file.read_text().replace("a b", "a c"))
    assert identity_of(Mixture({"scenes": scenes, "own": PairsFile(file)})) != before
    with pytest.raises(UnknownState, match="list has no identity"):
        identity_of(Mixture({"scenes": scenes, "own": [1, 2]}))


# --- weights, code of one's own and files that settings name ----------------------------------------------------------


def test_weights_count_by_their_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    tower.mkdir()
    save_file({"a": ones(3)}, tower / "model.safetensors")
    before = pieces(config, source=tower)
    assert differing(pieces(config), before) == ["the weights it starts from are another"]
    with giving_parts({"encoder": str(tower)}):
        assert len(differing(before, pieces(config, source=tower))) == 1
    save_file({"a": 2 * ones(3)}, tower / "model.safetensors")
    assert differing(before, pieces(config, source=tower)) == ["the weights it starts from are another"]


def test_a_hand_off_counts_by_its_hashes_and_its_base(tmp_path: Path) -> None:
    def handoff(name: str, sha: str, **more: Any) -> Path:
        parts = {part: {"_target_": "x"} for part in ("encoder", "middleware")}
        about = {"format": 1, "stage": "contrastive", "step": 1, "parts": {"encoder": {"sha256": sha}}, "config": parts, **more}
        write_json(tmp_path / name / "manifest.json", about)
        return tmp_path / name

    start = handoff("start", "1")
    base = {"place": str(start), "beside": "../start", "fingerprint": "x", "names": ["encoder.a"]}
    found = [state_of_weights(start), state_of_weights(handoff("light", "2", base=base))]
    assert state_of_weights(handoff("moved", "1", stage="other", step=7)) == found[0]
    handoff("start", "3")
    assert state_of_weights(start) != found[0]
    assert state_of_weights(tmp_path / "light") != found[1]


def test_code_of_ones_own_counts_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package, helper = tmp_path / "my_reused_parts", tmp_path / "my_reused_helper.py"
    package.mkdir()
    (package / "tower.py").write_text("import json\nimport not_there\nfrom my_reused_helper import width\nimport torchmetrics\n")
    (package / "broken.py").write_text("print 1")
    helper.write_text("width = 1\n")
    settings = {"encoder": {"_target_": "my_reused_parts.tower.Tower"}, "optimizer": {"_target_": "torch.optim.SGD"}}
    before = foreign_code(settings)
    assert before.keys() == {"my_reused_parts", "my_reused_helper", "torchmetrics", "torch"}
    assert before["torchmetrics"].startswith("torchmetrics 1.")
    helper.write_text("width = 2\n")
    after = foreign_code(settings)
    assert [name for name in before if before[name] != after[name]] == ["my_reused_helper"]
    with pytest.raises(UnknownState, match="the code of nowhere cannot be found"):
        foreign_code({"encoder": {"_target_": "nowhere.Tower"}})


def test_files_that_settings_name_count(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, folder = tmp_path / "mine.jinja", tmp_path / "folder"
    template.write_text("one")
    folder.mkdir()
    (folder / "picture").write_text("one")
    config = changed(config, ("data", "chats_collate", "template"), str(template))
    config["stages"]["supervised"]["evaluation"]["mine"] = {
        "_target_": "lightning_internvl.evaluation.tasks.Answering",
        "of": str(folder),
    }
    before = pieces(config, "supervised")
    template.write_text("two")
    touch(folder / "picture")
    lines = differing(before, pieces(config, "supervised"))
    assert lines == [f"the content of {template} is another", f"the content of {folder} is another"]
    monkeypatch.setattr(key, "cached_folder", lambda hub_id: f"/cache/{hub_id}/snapshots/abc")
    config = changed(config, ("decoder", "pretrained"), "OWNER/NAME")
    assert pieces(config, "supervised")["the content of OWNER/NAME"] == "abc"


def test_what_nobody_can_compare_says_why(config: dict[str, Any]) -> None:
    def reason(path: tuple[str, ...], value: Any) -> str:
        other = changed(config, path, value)
        return pieces_of(stage_settings(other, "supervised"), other, None, build)[UNKNOWN]

    assert "torch.utils.data.TensorDataset has no identity()" in reason(
        ("data", "chats"), {"_target_": "torch.utils.data.TensorDataset"}
    )
    assert "holds a secret" in reason(("stages", "supervised", "module", "api_key"), "hush")
    assert "no/where is not on this machine yet" in reason(("decoder", "pretrained"), "no/where")


def test_much_is_looked_at_only_where_reuse_asks(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "MOST", 1)
    monkeypatch.setattr(key, "MOST_BYTES", 9)
    pairs = {"_target_": "lightning_internvl.data.files.datasets.PairsFile", "path": str(pictures(tmp_path))}
    other, weights = changed(config, ("data", "pairs"), pairs), tmp_path / "weights"
    of_files, drawn = ((stage_settings(one, "contrastive"), one, None, build) for one in (other, config))
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"ten bytes.")
    of_weights = *drawn[:2], weights, build
    assert not any(UNKNOWN in one for one in (pieces_of(*of_files), pieces_of(*of_weights), pieces_of(*drawn, asked=False)))
    assert "samples are compared only where reuse asks for it" in pieces_of(*of_files, asked=False)[UNKNOWN]
    assert f"of {weights} are compared only where reuse asks for it" in pieces_of(*of_weights, asked=False)[UNKNOWN]


# --- a stage that was not always the same -----------------------------------------------------------------------------


@pytest.fixture
def stage(config: dict[str, Any], tmp_path: Path) -> tuple[StageSettings, dict[str, Any], Path, None, Any]:
    """What `keyed` is called with, for a stage that has a hand-off."""
    write_json(tmp_path / "handoff" / "contrastive" / "manifest.json", {})
    return stage_settings(config, "contrastive"), config, tmp_path, None, build


def key_of(stage: Any) -> Path:
    return stage[2] / "handoff" / "contrastive" / KEY


def test_a_finished_stage_leaves_its_key(stage: Any) -> None:
    with keyed(*stage):
        assert not key_of(stage).exists()
    assert keep.read_key(key_of(stage))["made_of"] == made_of(*(stage[i] for i in (0, 1, 3, 4)))
    key_of(stage).write_text(key_of(stage).read_text()[:-9])
    assert keep.read_key(key_of(stage)) is None


def test_one_that_was_resumed_with_other_settings_leaves_none(stage: Any) -> None:
    with keyed(*stage):
        write_json(stage[2] / "checkpoints" / "contrastive" / "last.ckpt", {})
    key_of(stage).unlink()
    with keyed(dataclasses.replace(stage[0], batch_size=2), *stage[1:]):
        pass
    assert not key_of(stage).exists()
    with keyed(*stage):
        pass
    assert key_of(stage).exists()


def test_one_whose_code_changed_meanwhile_leaves_none(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with keyed(*stage):
        monkeypatch.setattr(key, "own_code", lambda: "other")
    assert not key_of(stage).exists()


def test_one_that_left_out_a_sample_for_its_time_leaves_none(stage: Any) -> None:
    with keyed(*stage):
        rows = [{"kind": "broken line"}, {"kind": "too slow"}]
        (stage[2] / "stages" / "contrastive" / "skipped.1.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert not key_of(stage).exists()


def test_one_that_cannot_be_compared_leaves_none(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Any) -> dict[str, str]:
        raise UnknownState("for no reason")

    monkeypatch.setattr(key, "foreign_code", unknown)
    with keyed(*stage):
        pass
    assert not key_of(stage).exists()


def test_where_runs_are_looked_for(tmp_path: Path) -> None:
    job, paths = tmp_path / "sweep" / "3", {"paths": {"root": "outputs"}}
    assert keep.place_to_look({"reuse": "sweep", **paths}, job) is None
    (tmp_path / "sweep" / ".jobs").mkdir(parents=True)
    found = [keep.place_to_look({"reuse": reuse, **paths}, job) for reuse in ("sweep", True, "folder", False)]
    assert found == [tmp_path / "sweep", Path("outputs"), Path("folder"), None]
    assert keep.place_to_look(paths, job) is None
    assert code.own_code() == code.own_code()
