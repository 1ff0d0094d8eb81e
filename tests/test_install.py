"""The repository as an installed package, and the extras that its files name."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ROOT, TINY

import lightning_internvl

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = {path.stem.removeprefix("requirements-") for path in ROOT.glob("requirements-*.txt")}
OWN_WAY = {"lmms", "smollm2"}  # an environment of its own; --no-deps
RECIPE = "# @package _global_\ndefaults:\n  - override /encoder: internvit_toy\nname: mine\npipeline: [contrastive]\n"


def run(*words: str, cwd: Path, path: Path) -> str:
    """What a Python program prints in another folder, with nothing but `path` to import from."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install` fills it, from a copy of what is under version control."""
    folder = tmp_path_factory.mktemp("installed")
    copy = folder / "copy"
    copy.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-cf", str(folder / "copy.tar"), "--null", "-T", "-"], input=files, cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", str(folder / "copy.tar"), "-C", str(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(copy)], check=True, capture_output=True)
    return folder / "site"


def test_the_installed_package_serves_from_any_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(RECIPE)
    where = run("-c", "import lightning_internvl as l; print(l.__file__)", cwd=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    own = [word for word in TINY if not word.startswith(("stages.", "decoder."))]
    words = ["--config-dir", "conf", "experiment=mine", *own, "stages.contrastive.batch_size=4"]
    out = run("-m", "train", *words, "plan=true", cwd=tmp_path, path=installed)
    assert "contrastive: 1 device" in out


def test_all_that_the_package_reads_is_installed(installed: Path) -> None:
    for folder in ("conf", "callbacks", "lightning_internvl"):
        files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        files = {path for path in files if "__pycache__" not in path.parts}
        assert not sorted(path for path in files if not (installed / path).is_file())
    names = {"internvl-train", "internvl-evaluate", "internvl-export", "internvl-chat"}
    assert names <= {path.name for path in (installed / "bin").iterdir()}


def test_every_file_of_requirements_is_an_extra_and_tested() -> None:
    extras = PROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert set(extras) == FILES - OWN_WAY - {"dev"}
    assert {f"requirements-{name}.txt" for name in extras} == {one["file"] for one in extras.values()}
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    tested = {line.removeprefix("-r requirements-")[:-4] for line in lines if line.startswith("-r requirements-")}
    assert tested == set(extras) - {"clip-benchmark"}  # which needs torchvision


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_another_python_is_refused_in_one_sentence(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 1, "final", 0))
    source = Path(lightning_internvl.__file__).read_text()
    with pytest.raises(SystemExit, match=r"^lightning_internvl needs Python 3\.11 to 3\.13; this is "):
        exec(compile(source, "lightning_internvl", "exec"), vars(SimpleNamespace(__name__="old")))


@pytest.mark.parametrize("script", ["train", "evaluate", "export", "chat"])
def test_the_commands_look_at_python_first(script: str) -> None:
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    first = next(line for line in lines if line.startswith(("import ", "from ")) and "__future__" not in line)
    assert first.startswith("import lightning_internvl ")
