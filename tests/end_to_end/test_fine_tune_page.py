"""The commands of docs/fine-tune.md, on a file and a checkpoint made for the purpose."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from string import Template

import pytest
from PIL import Image
from runs import ROOT, call, train

from lightning_internvl.data.scenes.datasets import SceneChats

PAGE = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of the second block of the page; the first one is for the reader to fill in."""
    block = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    return block.strip().splitlines()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mine")
    unseen = ("callbacks.evaluation=null", "callbacks.samples=null")
    toy = train("experiment=llava_toy", "debug=fast", *unseen, f"paths.run={folder}/toy")
    assert toy.code == 0, toy.err
    (folder / "pictures").mkdir()
    scenes = SceneChats(seed=3, split="train", image_size=96, turns=2)
    lines = []
    for i in range(24):
        sample = scenes[i]
        Image.fromarray(sample["images"][0]).save(folder / "pictures" / f"{i}.png")
        roles = {"user": "human", "assistant": "gpt"}
        turns = [{"from": roles[m["role"]], "value": m["content"]} for m in sample["conversation"]]
        lines.append(json.dumps({"id": f"scene-{i}", "image": f"pictures/{i}.png", "conversations": turns}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    assert call("export.py", f"run={folder}/toy", f"to={folder}/base").code == 0
    return {"BASE": f"{folder}/base", "DATA": f"{folder}/chats.jsonl", "RUN": f"{folder}/run", "MODEL": f"{folder}/model"}


def test_the_page_has_four_commands() -> None:
    assert [line.split()[1] for line in commands()] == ["train.py", "train.py", "export.py", "chat.py"]


def test_its_commands_run(places: dict[str, str]) -> None:
    asked = f"/image {Path(places['DATA']).parent}/pictures/1.png\nwhat colour is the background?\n/quit\n"
    told = []
    for line in commands():
        _, script, *words = shlex.split(Template(line).substitute(places))
        if script == "train.py":
            words.append("callbacks.samples.images=2")
        done = call(script, *words, typed=asked)
        assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
        told.append(done.out)
    assert "24 records read" in told[0]
    assert "held out; " in told[1]
    assert " epochs; " in told[1]
    assert re.search(r"best validation_loss .* at step \d+ of \d+; these weights are handed over", told[1])
    assert "answers about held-out data, 3 of " in told[1]
    report = (Path(places["RUN"]) / "report.html").read_text()
    assert 'data-label="validation loss"' in report
    assert '<section id="film">' in report
    assert "transformers.LlavaForConditionalGeneration" in told[2]
    assert (Path(places["MODEL"]) / "model.safetensors").is_file()
    adapters = Path(places["RUN"]) / "handoff" / "finetune" / "decoder.safetensors"
    assert adapters.stat().st_size < (Path(places["MODEL"]) / "model.safetensors").stat().st_size
