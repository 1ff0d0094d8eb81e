"""Wrong documents are the nearest ones that no equal query calls right; the file is one that the stage reads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from lightning_internvl.data.collate.embedding import EmbeddingCollator
from lightning_internvl.data.files.datasets import PairsFile
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.inference import mine_negatives
from lightning_internvl.inference.collators import View
from lightning_internvl.inference.mine_negatives import EmbeddedPairs, embed_samples, nearest_wrong
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import EmbeddingContrast

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_nearest_that_are_wrong() -> None:
    # Documents 0 and 3 are one; queries 1 and 4 are one, so that each has two right documents. Query 3 is nearer to document 1
    # than to its own.
    documents, names = on_circle(0, 20, 50, 0, 25), torch.tensor([7, 8, 9, 7, 6])
    pairs = EmbeddedPairs(on_circle(0, 20, 50, 12, 20), documents, torch.tensor([1, 2, 3, 4, 2]), names)
    assert nearest_wrong(pairs, 2) == [[1, 4], [0, 2], [4, 1], [4, 2], [0, 2]]
    assert nearest_wrong(pairs, 1) == [[1], [0], [4], [4], [0]]
    margin = 0.1  # cos 0 - cos 20 is 0.06, cos 0 - cos 25 is 0.09
    assert nearest_wrong(pairs, 3, margin) == [[2], [2], [1, 0], [2], [2]]


def test_with_a_vector_a_token_too() -> None:
    late = normalize(torch.stack([on_circle(0, 90), on_circle(45, 45), on_circle(90, 0)]), dim=-1)
    pairs = EmbeddedPairs(late, late, torch.arange(3), torch.tensor([0, 1, 0]))  # 0 and 2 have the same tokens
    assert nearest_wrong(pairs, 2) == [[1], [0], [1]]


@pytest.fixture
def view() -> View:
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = HFCausalLM(config=config, vocab_size=len(tokenizer), embed_std=0.3)
    encoder = InternViT(image_size=8, patch_size=8, dim=8, depth=1, heads=2, mlp_dim=8)
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    objectives = {"embedding": EmbeddingContrast(decoder_dim=16, pooling="last")}
    model = VLM(encoder, MLPConnector(encoder_dim=8, decoder_dim=16), decoder, objectives=objectives, image_token_id=token)
    pairs = EmbeddingCollator(tokenizer, load_template("vicuna"), Squash(8), 1, 64, negatives=2, text_length=40)
    return View(pairs, None, None, model.eval())


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Pictures and texts, two captions of one picture among them."""
    (tmp_path / "data").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / "data" / f"{name}.png")
    rows = [
        {"image": "red.png", "caption": "a red square"},
        {"image": "red.png", "caption": "something red"},
        {"query": {"text": "what is this?", "image": "green.png"}, "positive": "a colour", "negatives": ["a word"]},
        {"anchor": "sky", "positive": {"image": "blue.png"}},
    ]
    path = tmp_path / "data" / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_file_is_read_with_its_pictures_elsewhere(
    view: View, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SimpleNamespace(trainer=SimpleNamespace(precision="32-true"))
    monkeypatch.setattr(mine_negatives, "open_run", lambda *_: SimpleNamespace(view=view, settings=settings))
    words = ["--run", "RUN", "--pairs", str(records), "--out", str(tmp_path / "mined.jsonl"), "--device", "cpu"]
    mine_negatives.main([*words, "--count", "9", "--margin=-2"])
    assert "8 wrong documents of 4 queries" in capsys.readouterr().out
    before, after = PairsFile(records), PairsFile(tmp_path / "mined.jsonl")
    embedded = embed_samples(view.model, view.pairs, after, nullcontext)
    torch.testing.assert_close(embedded, embed_samples(view.model, view.pairs, before, nullcontext))
    for place, wrong in enumerate(nearest_wrong(embedded, 9, -2.0)):
        shown = [[image.tolist() for image in one["images"]] for one in after[place]["negatives"]]
        assert shown[: len(wrong)] == [[image.tolist() for image in after[other]["positive"]["images"]] for other in wrong]
    assert after[2]["negatives"][-1]["text"] == "a word"  # its own comes last
    assert len(view.pairs.prepare(after[0])["passages"]) == 4

    with pytest.raises(SystemExit, match="2"):
        mine_negatives.main([*words, "--count", "0"])
    assert "--count" in capsys.readouterr().err
    monkeypatch.setattr(mine_negatives, "open_run", lambda *_: SimpleNamespace(view=view._replace(pairs=None), settings=settings))
    with pytest.raises(SystemExit, match="2"):
        mine_negatives.main(words)
    assert "no stage that embeds" in capsys.readouterr().err
