"""Articles with pictures: a scripted author, a real contrastive model, a folder of one-coloured pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.inference import illustrate_command
from lightning_internvl.inference.collators import View
from lightning_internvl.inference.illustrate import Author, illustrate, picture_places
from lightning_internvl.inference.picture_search import Gallery, Retriever
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}
TEXT = "A red fox.\nA walk.\n\nThe blue sea.\n"


class Script:
    """An author with prepared answers, by a word of the request."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, []

    def ask(self, request: str, images: Sequence[np.ndarray] = (), max_new_tokens: int = 100) -> str:
        self.asked.append((request, len(images)))
        return next((answer for word, answer in self.answers.items() if word in request), "")


class Words:
    """A retriever that knows what the pictures are named for: one axis a colour."""

    batch_size = 2

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        names = [tuple(int(v) for v in image[0, 0]) for image in images]
        return torch.stack([torch.eye(4)[list(COLOURS.values()).index(name)] for name in names])[:, None]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        found = torch.tensor([[float(colour in text) for colour in COLOURS] for text in texts])
        return found + 0.01 * torch.tensor([4.0, 3.0, 2.0, 1.0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), colour).save(tmp_path / ("deep" if name == "blue" else ".") / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def names(paths: Sequence[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_the_author_says_where_what_and_which(folder: Path) -> None:
    author = Script(choose_="", lines="<Seg3>, <Seg1> and <Seg9>", caption="a blue lake", letter="B")
    article = illustrate(author, Gallery(folder, Words()), text=TEXT, pictures=2, candidates=2)
    assert article.paragraphs == ["A red fox.", "A walk.", "The blue sea."]
    assert [placed.after for placed in article.pictures] == [0, 2]
    first, second = article.pictures
    assert names([f.path for f in first.candidates]) == ["blue", "red"]
    assert first.path.stem == "red"  # B
    assert names([f.path for f in second.candidates]) == ["blue", "green"]  # red is taken
    assert second.path.stem == "green"
    assert [count for _, count in author.asked] == [0, 0, 2, 0, 2]
    assert "<Seg1> A red fox.\n<Seg2> A walk." in author.asked[1][0]
    assert "A <image>, B <image>" in author.asked[2][0]
    lines = article.markdown().splitlines()
    assert lines[:5] == ["A red fox.", "", f"![a blue lake]({folder.as_posix()}/red.png)", "", "A walk."]


def test_an_author_who_says_nothing_leaves_it_to_the_similarities(folder: Path) -> None:
    article = illustrate(Script(), Gallery(folder, Words()), text=TEXT, pictures=2)
    assert [(placed.after, placed.path.stem, placed.caption) for placed in article.pictures] == [
        (0, "red", "A red fox."),
        (2, "blue", "The blue sea."),
    ]


def test_a_title_is_written_first(folder: Path) -> None:
    author = Script(title="One line.\nTwo lines.", lines="2")
    article = illustrate(author, Gallery(folder, Words()), title="Lines", pictures=1, candidates=1)
    assert article.paragraphs == ["One line.", "Two lines."]
    assert [placed.after for placed in article.pictures] == [1]
    assert picture_places(author, Gallery(folder, Words()), article.paragraphs, 0) == []


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    gallery = Gallery(folder, Words())
    for wrong in ({}, {"text": "a", "title": "b"}):
        with pytest.raises(ValueError, match="of a text or of a title"):
            illustrate(Script(), gallery, **wrong)
    with pytest.raises(ValueError, match="article is empty"):
        illustrate(Script(), gallery, text="\n \n")
    with pytest.raises(ValueError, match="candidates=9 from 1 to 8"):
        illustrate(Script(), gallery, text="a", candidates=9)
    with pytest.raises(ValueError, match="is no folder"):
        Gallery(tmp_path / "nowhere", Words())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        Gallery(tmp_path / "empty", Words())


def toys() -> tuple[VLM, VLM, dict[str, Any]]:
    """A contrastive model and one that answers, untrained, and how they read."""
    torch.manual_seed(0)
    tokenizer, processor = toy_tokenizer(), Squash(16)
    tower = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
    reader = QLLaMA(
        encoder_dim=16, vocab_size=len(tokenizer), dim=16, depth=2, heads=2, mlp_dim=32, num_queries=2, embed_dim=8, pool_heads=2,
        patches=False,
    )  # fmt: skip
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = HFCausalLM(config=config | {"max_position_embeddings": 4096}, vocab_size=len(tokenizer))
    chat = VLM(
        InternViT(**tower),
        MLPConnector(encoder_dim=16, decoder_dim=16),
        decoder,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    pairs = PairCollator(tokenizer, processor, max_length=64)
    return VLM(InternViT(**tower), reader), chat, {"pairs": pairs, "tokenizer": tokenizer, "processor": processor}


def test_the_command_writes_markdown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contrastive, chat, how = toys()
    short = ChatCollator(how["tokenizer"], load_template("vicuna", ""), how["processor"], 4, 16)  # as its training was
    stages = {"author": View(None, short, None, chat), "retriever": View(how["pairs"], None, None, contrastive)}
    monkeypatch.setattr(illustrate_command, "open_run", lambda place, _: SimpleNamespace(view=stages[place.name]))
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--article", str(tmp_path / "text.txt"), "--pictures", str(folder), "--out", str(tmp_path / "out.md")]
    illustrate_command.main([*words, "--author", "author", "--retriever", "retriever", "--count", "2"])
    assert (tmp_path / "out.md").read_text().count("![") == 2
    for wrong, message in ((["--author", "author"], "reads no captions"), (["--author", "retriever"], "has no decoder")):
        with pytest.raises(SystemExit, match="2"):
            illustrate_command.main([*words, *wrong])
        assert message in capsys.readouterr().err


def test_untrained_models_come_to_an_end(folder: Path) -> None:
    contrastive, chat, how = toys()
    retriever = Retriever(contrastive, how["pairs"], batch_size=3)
    gallery = Gallery(folder, retriever)
    assert gallery.embeds_NQE.shape == (4, 1, 8)
    torch.testing.assert_close(gallery.embeds_NQE.norm(dim=-1), torch.ones(4, 1))
    (found,) = gallery.search(["a red thing"], 9)
    expected = retriever.texts(["a red thing"]) @ gallery.embeds_NQE[:, 0].T
    torch.testing.assert_close(torch.tensor([f.similarity for f in found]), expected[0].sort(descending=True).values)
    collator = ChatCollator(how["tokenizer"], load_template("vicuna", ""), how["processor"], 4, 2048)
    article = illustrate(Author(chat, collator, max_new_tokens=3), gallery, text=TEXT, pictures=2)
    assert len({placed.path for placed in article.pictures}) == 2
