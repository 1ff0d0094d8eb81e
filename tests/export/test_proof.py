"""A folder that proves what its card says, and what is named when it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lightning_internvl.cli import CONF
from lightning_internvl.export.proof import PROBE, PROOF, bases_of, verify, without_secrets
from lightning_internvl.export.report import ExportReport
from lightning_internvl.export.settings import ExportSettings, check_settings
from lightning_internvl.files import read_json, write_json
from lightning_internvl.messages import ConfigError

Exported = Callable[..., tuple[Path, ExportReport]]


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy of an exported folder."""
    return Path(shutil.copytree(exported("llava_toy")[0], tmp_path / "copy"))


def rehash(folder: Path) -> None:
    """As one who changed a file and hides it would do it."""
    from lightning_internvl.export.proof import hashes

    proof = read_json(folder / PROOF)
    proof["files"] = hashes(folder, [folder / name for name in proof["files"]])
    write_json(folder / PROOF, proof)


def test_what_is_as_it_was_written(folder: Path) -> None:
    files, probe = verify(folder)
    assert files.endswith("have the hashes that were written")
    assert "logits of 2 inputs within 0.0e+00 of the largest, the same greedy ids" in probe
    listed = read_json(folder / PROOF)["files"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", PROBE} <= set(listed)
    assert f"| `model.safetensors` | {listed['model.safetensors']} |" in (folder / "README.md").read_text()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]  # all of these are read as weights


def test_a_changed_and_a_missing_file_are_named(folder: Path) -> None:
    with (folder / "README.md").open("a") as card:
        card.write("Better than all others.")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"is not what it says:\n  missing: chat_template\.jinja\n  changed: README\.md$"):
        verify(folder)


def test_other_weights_under_other_hashes_are_found_by_their_logits(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rehash(folder)
    with pytest.raises(ValueError, match=r"the logits of the stored probe \(wide picture\) differ by 1\.\d+e-02 of the largest"):
        verify(folder)


def test_other_greedy_ids_are_named(folder: Path) -> None:
    proof = read_json(folder / PROOF)
    proof["probe"]["prompts"][1]["ids"][0][0] += 1
    write_json(folder / PROOF, proof)
    with pytest.raises(ValueError, match=r"the greedy ids of the stored probe \(text alone\) are"):
        verify(folder)


def test_the_files_of_the_base(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"license": "mit"}))
    (base / "model.safetensors").write_bytes(b"weights")
    (entry,) = bases_of({"init_from": str(base), "decoder": {"pretrained": None}})
    assert (entry["name"], entry["licence"], sorted(entry["files"])) == ("base", "mit", ["config.json", "model.safetensors"])
    assert bases_of({"init_from": "OWNER/NAME"}) == [{"name": "OWNER/NAME", "licence": "not stated", "files": {}}]
    write_json(folder / PROOF, read_json(folder / PROOF) | {"bases": [entry], "probe": None})
    assert "not checked; base=FOLDER names one" in verify(folder)[1]
    assert verify(folder, base)[1].endswith("base (licence: mit): 2 files have the hashes that were written")
    (base / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"changed of the base base: model\.safetensors"):
        verify(folder, base)


def test_a_folder_without_proof(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no proof/proof\.json of format 1: only folders that export\.py wrote"):
        verify(tmp_path)


def test_names_of_data_tell_nothing_that_opens_it() -> None:
    assert without_secrets("/home/me/chats.jsonl") == "chats.jsonl"
    assert without_secrets("https://me:word@host.org/a/chats.tar?token=1#x") == "https://host.org/a/chats.tar"


def settings(*overrides: str) -> ExportSettings:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check_settings(OmegaConf.to_container(compose("export", overrides=list(overrides)), resolve=True))


def test_settings(tmp_path: Path) -> None:
    assert settings(f"verify={tmp_path}", f"base={tmp_path}").base == tmp_path
    for given, problem in (
        ((), "run has no value; give run=VALUE, or verify=FOLDER alone"),
        ((f"verify={tmp_path}", "run=x"), "run=x has no effect with verify="),
        (("verify=nowhere",), "verify=nowhere: there is no such folder"),
        ((f"verify={tmp_path}", "base=nowhere"), "base=nowhere: there is no such folder"),
        ((f"run={tmp_path}", f"to={tmp_path / 'x'}", f"base={tmp_path}"), "has no effect without verify=FOLDER"),
    ):
        with pytest.raises(ConfigError) as caught:
            settings(*given)
        assert problem in str(caught.value)
