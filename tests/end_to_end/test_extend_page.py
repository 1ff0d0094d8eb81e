"""docs/extend.md as it stands: its files become a package and a folder of YAMLs, its commands run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT, TINY, Outcome, call, once, read_json, train

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
KINDS = (
    "Encoder", "Middleware", "Decoder", "Loss", "Stage", "Dataset", "Processor", "Callback", "Metric", "Logger", "Optimizer",
    "Evaluation task", "Checkpoint layout",
)  # fmt: skip
BEGINNINGS = ("middleware.", "decoder.", "stages.contrastive.", "callbacks.", "debug=")
SMALL = [word for word in TINY if word.startswith(BEGINNINGS)]
LINES = 20  # of an example


def blocks(kind: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    """The words of all commands of the page, in their order."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def words_of(script: str, *without: str) -> list[list[str]]:
    """The settings of the commands of a script that have none of these words."""
    found = [words[1:] for words in commands() if words[0] == script]
    return [[w for w in words if "=" in w] for words in found if not any(w.startswith(without) for w in words)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files."""
    folder = tmp_path_factory.mktemp("page")
    for text in (*blocks("python"), *blocks("yaml")):
        name, _, rest = text.partition("\n")
        path = folder / name.removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rest)
    records = [{"image": str(ROOT / "docs" / "film.png"), "caption": f"a page, {i}"} for i in range(8)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "MYCODE"))
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def own(folder: Path, script: str, *words: str) -> Outcome:
    """A command with the page's YAMLs."""
    return call(script, "--config-dir", str(folder / "MYCONF"), *once(*words))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of the recipe of the page, which is all of it by YAML."""
    outcome = own(folder, "train.py", *SMALL, "experiment=mine", f"paths.run={folder / 'run'}")
    assert outcome.code == 0, outcome.err
    return folder / "run"


@pytest.fixture(scope="module")
def model(folder: Path, run: Path) -> Path:
    """The run in the page's own layout."""
    (words,) = words_of("export.py", "layout=handoff")
    outcome = call("export.py", *filled(words, folder))
    assert outcome.code == 0, outcome.err
    return folder / "MODEL"


def filled(words: list[str], folder: Path) -> list[str]:
    """Words with the places of this test."""
    places = {"RUN": "run", "MODEL": "MODEL", "HANDOFF": "HANDOFF", "FILE": "captions.jsonl"}
    return [re.sub(r"=([A-Z]+)$", lambda found: f"={folder / places[found[1]]}", word) for word in words]


def test_each_kind_has_an_example_that_is_short() -> None:
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert set(KINDS) <= set(sections)
    for kind in KINDS:
        code = blocks("python", sections[kind])
        assert code, kind
        assert blocks("bash", sections[kind]), kind
        assert len([line for line in code[0].splitlines()[1:] if line.strip()]) <= LINES, kind


def test_all_kinds_train_by_yaml(run: Path, folder: Path) -> None:
    parts = read_json(run / "handoff" / "supervised" / "manifest.json")["config"]
    found = [parts[name]["_target_"] for name in ("encoder", "middleware", "decoder")]
    assert found == ["mine.encoder.MeanColours", "mine.middleware.Gated", "mine.decoder.Calm"]
    first = read_json(run / "handoff" / "contrastive" / "manifest.json")
    assert first["config"]["objectives"]["itc"]["_target_"] == "mine.losses.Triplet"
    assert "objectives.itc.margin" in first["trained"]
    stage = run / "stages" / "supervised"
    assert "train/size" in (stage / "lines.txt").read_text()  # the logger, of the loss of the stage
    assert "encoder.widen.weight " in (stage / "largest.txt").read_text()
    assert 0 < read_json(run / "metrics.json")["supervised"]["distinct"] <= 1
    assert "mine.optimizer.radam" in (run / "config.yaml").read_text()


def test_all_kinds_train_by_the_command_line(run: Path, folder: Path) -> None:
    said = words_of("train.py", "experiment=", "resume=", "objective=cosine")
    words = [word for one in said for word in one]
    assert len(words) > 12
    outcome = own(folder, "train.py", "~experiment", *SMALL, *words, f"paths.run={folder / 'typed'}")
    assert outcome.code == 0, outcome.err
    typed, recipe = (read_json(one / "handoff" / "supervised" / "manifest.json")["config"] for one in (folder / "typed", run))
    assert typed["decoder"].pop("limit") == 15  # given beside it
    assert recipe["decoder"].pop("limit") == 20.0
    assert typed == recipe
    assert set(read_json(folder / "typed" / "metrics.json")["supervised"]) == set(read_json(run / "metrics.json")["supervised"])


def test_a_loss_without_parameters_trains(folder: Path) -> None:
    (words,) = (one for one in words_of("train.py") if "objective=cosine" in one)
    outcome = own(folder, "train.py", *SMALL, "encoder=mean_colours", *words, f"paths.run={folder / 'cosine'}")
    assert outcome.code == 0, outcome.err
    assert "objectives" not in read_json(folder / "cosine" / "handoff" / "contrastive" / "manifest.json")["parts"]


def test_what_was_trained_is_measured_talked_to_exported_and_fine_tuned(folder: Path, model: Path) -> None:
    (task,) = (words for words in words_of("evaluate.py") if "task=first_letter" in words)
    measured = own(folder, "evaluate.py", *filled(task, folder), "samples=4")
    assert measured.code == 0, measured.err
    assert read_json(folder / "run" / "evaluation" / "metrics.json")["first_letter"]["samples"] == 4
    asked = {"typed": f"/image {ROOT / 'docs' / 'film.png'}\nwhich colour?\n/quit\n"}
    for script, *words in commands()[-6:]:
        settings = filled(words, folder)
        refused = call(script, *(word for word in settings if not word.startswith("trust=")))
        assert refused.code == 2, words
        assert "trust=[" in refused.err, words
        more = ["debug=fast", f"paths.run={folder / 'tuned'}"] if "experiment=finetune" in words else []
        opened = call(script, *settings, *more, **(asked if script == "chat.py" else {}))
        assert opened.code == 0, f"{words}\n{opened.err}"
    assert (folder / "tuned" / "handoff" / "finetune" / "manifest.json").is_file()
    assert read_json(folder / "HANDOFF" / "processor.json")["_target_"] == "mine.processor.Grey"


def test_both_layouts_start_a_fine_tune(folder: Path, model: Path) -> None:
    assert read_json(model / "config.json")["model_type"] == "mine"
    words = ["experiment=finetune", "debug=fast", f"init_from={model}", f"data.path={folder / 'captions.jsonl'}", "trust=[mine]"]
    tuned = train(*words, f"paths.run={folder / 'tuned_model'}")
    assert tuned.code == 0, tuned.err
    assert "_target_: mine.processor.Grey" in (folder / "tuned_model" / "config.yaml").read_text()
    (words,) = (one for one in words_of("chat.py") if "run=RUN" in one)
    answered = call("chat.py", f"run={folder / 'tuned_model'}", *words[1:], "question=which colour?")
    assert answered.code == 0, answered.err
