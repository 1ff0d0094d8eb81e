"""Every published name of InternVL opens with tokenizer and chat format, trains two steps, is saved and opens again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from internvl_files import MARKS, RELEASED, TOWERS, drawn, tower_shapes, write_model, write_tokenizer
from internvl_names import KINDS, NAMES, TOWERS as TOWER_NAMES, Kind
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained
from lightning_internvl.data.tokenizer import saved_tokenizer
from lightning_internvl.inference.load_official import open_model

PAGE = Path(__file__).parents[2] / "docs" / "internvl.md"
SAMPLE = {
    "images": [np.full((40, 60, 3), 90, np.uint8)],
    "conversation": [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": "a cat"}],
    "key": "one",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, int]]:
    """Tokenizers by kind: their folder, how many words they have, and which is for visual tokens."""
    found = {}
    for name in dict.fromkeys(kind.tokenizer for kind in KINDS):
        folder = tmp_path_factory.mktemp("words") / name
        write_tokenizer(name, folder)
        tokenizer = saved_tokenizer(str(folder))
        found[name] = folder, len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return found


def two_steps(model: Any, batch: dict[str, Any]) -> list[float]:
    """The losses before, between and after them."""
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return [*losses, float(model.eval()(**batch).loss)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.names[0]} and {len(kind.names) - 1} more")
def test_open_train_save_open(kind: Kind, words: dict[str, tuple[Path, int, int]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder, (tokenizer, size, image) = tmp_path / "published", words[kind.tokenizer]
    shutil.copytree(tokenizer, folder)
    write_model(kind, folder, size, image)

    found = open_model(folder)
    model, chats = found.view.model, found.view.chats
    assert found.layout == kind.layout
    assert chats.template.name == kind.chat
    assert (chats.template.system or "").startswith(kind.system)
    assert bool(chats.template.system) == bool(kind.system)
    batch = chats([SAMPLE])
    # a thumbnail beside tiles, where there are any; a token for each after the shuffle of 2 x 2 patches
    shown = int((batch["input_ids"] == model.image_token_id).sum())
    assert shown == len(batch["pixel_values"]) * (4 if kind.layout == "internvl_chat_llava" else 1)
    before, _, after = two_steps(model, batch)
    assert after < before

    model.save_pretrained(tmp_path / "saved", layout=kind.layout)
    there, here = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert {name: tensor.shape for name, tensor in there.items()} == {name: tensor.shape for name, tensor in here.items()}
    shutil.copytree(tokenizer, tmp_path / "saved", dirs_exist_ok=True)
    again = open_model(tmp_path / "saved").view
    assert again.chats.template == chats.template
    with torch.no_grad():
        assert float(again.model(**batch).loss) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("tower", TOWER_NAMES)
def test_towers_alone(tower: str, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(RELEASED | TOWERS[tower]))
    save_file(drawn(tower_shapes(tower)), tmp_path / "published" / "model.safetensors")
    model, pixels = load_pretrained(tmp_path / "published"), torch.randn(2, 3, 28, 28)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model.encoder(pixels)[0].square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "saved", layout="intern_vit")
    there, here = (load_file(tmp_path / place / "model.safetensors") for place in ("published", "saved"))
    assert there.keys() == here.keys()
    again = load_pretrained(tmp_path / "saved")
    assert again.encoder(pixels)[0].equal(model.encoder(pixels)[0])


def test_no_name_is_listed_twice() -> None:
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    assert len(MARKS) == len(set(MARKS))


def test_the_page_lists_every_name() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in row.split("|")[1].replace("`", "").replace(",", " ").split()]
    assert sorted(listed) == sorted([*NAMES, *(name for names in TOWER_NAMES.values() for name in names)])
    assert f"{len(NAMES)} of {len(NAMES)}" in text
