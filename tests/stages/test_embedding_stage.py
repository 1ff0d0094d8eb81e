"""The stage `embed`: chunks and processes give one gradient; rows are embedded as if they were alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.collate.embedding import EmbeddingCollator
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.doctor.harness import redraw
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.launch import leave_processes
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.row_embeddings import embed_rows
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import EmbeddingContrast
from lightning_internvl.stages import EmbeddingStage
from lightning_internvl.training.optim import adamw, cosine

TOKENIZER = toy_tokenizer()
POOLINGS = ["last", "mean", "late"]


def stage(pooling: str = "last", **options: Any) -> EmbeddingStage:
    torch.manual_seed(0)
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(TOKENIZER),
    }  # fmt: skip
    encoder = InternViT(image_size=8, patch_size=8, dim=8, depth=1, heads=2, mlp_dim=8)
    decoder, connector = HFCausalLM(config=config, embed_std=0.3), MLPConnector(encoder_dim=8, decoder_dim=16)
    objective = EmbeddingContrast(decoder_dim=16, pooling=pooling, width=8, widths=[4], init_scale=5.0)
    token = TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = VLM(encoder, connector, decoder, objectives={"embedding": objective}, image_token_id=token)
    redraw(model)  # so that all tokens of a row matter
    return EmbeddingStage(
        model, name="embed", run_dir=Path(), parts={}, train=["middleware", "decoder", "objectives"], max_steps=2,
        optimizer=partial(adamw, lr=1e-2, weight_decay=0.0), scheduler=cosine, **options,
    )  # fmt: skip


def collator(negatives: int = 1, **options: Any) -> EmbeddingCollator:
    return EmbeddingCollator(TOKENIZER, load_template("vicuna"), Squash(8), 1, 24, negatives=negatives, text_length=20, **options)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def samples() -> list[dict[str, Any]]:
    """Pictures and texts on both sides; one sample has no wrong document, and one has two."""
    texts = [{"text": word, "images": []} for word in ("a red car", "two dogs", "a tree and a blue cup", "one")]
    shown = [{"text": "<image>", "images": [picture(i)]} for i in range(4)]
    both = {"text": "<image>\na cat on green", "images": [picture(9)]}
    wrong = [[shown[3]], [], [both, texts[0]], [texts[1]]]
    sides = zip(texts, [shown[0], shown[1], texts[3], both], wrong, strict=True)
    return [{"query": q, "positive": d, "negatives": n, "key": str(i)} for i, (q, d, n) in enumerate(sides)]


def batch(*places: int, **options: Any) -> dict[str, Any]:
    make = collator(**options)
    return make.stack([make.prepare(samples()[place]) for place in places])


def loss_of(found: EmbeddingStage, given: dict[str, Any]) -> Tensor:
    return found.weighted_sum(found.losses(given))


def gradient(found: EmbeddingStage, loss: Tensor) -> Tensor:
    found.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in found.parameters() if p.grad is not None])


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_gradient_of_the_whole_batch(pooling: str, chunk: int) -> None:
    found = stage(pooling, cached_chunk=chunk)
    whole, cached = batch(0, 1, 2, 3), batch(0, 1, 2, 3, cached_chunk=chunk)
    assert [len(part["input_ids"]) for part in cached["queries"]] == {1: [1] * 4, 3: [3, 1]}[chunk]
    one, two = loss_of(found, whole), loss_of(found, cached)
    assert two.item() == pytest.approx(one.item(), rel=1e-6)
    assert relative(gradient(found, two), gradient(found, one)) < 1e-6


def half(rank: int, folder: str, pooling: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = stage(pooling, cached_chunk=1)
    found.forward = partial(loss_of, found)  # type: ignore[method-assign]
    found.model.encoder.requires_grad_(False)
    both = DistributedDataParallel(found, find_unused_parameters=True)  # the language head is one
    loss = both(batch(*((0, 1) if rank == 0 else (2, 3)), cached_chunk=1))
    torch.save((gradient(found, loss), loss.detach()), f"{folder}/{rank}")
    del both, loss
    leave_processes()


@pytest.mark.parametrize("pooling", ["last", "late"])
def test_two_processes_make_the_step_of_one(pooling: str, tmp_path: Path) -> None:
    together(half, str(tmp_path), pooling, count=2)
    (one, first), (two, second) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    found = stage(pooling)
    found.model.encoder.requires_grad_(False)
    whole = loss_of(found, batch(0, 1, 2, 3))
    assert (first + second).item() / 2 == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(one, two)
    assert relative(one, gradient(found, whole)) < 1e-5


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_is_embedded_as_if_it_were_alone(pooling: str) -> None:
    found, make = stage(pooling), collator()
    texts = ["a red car", "a tree and a blue cup and two dogs"]
    both = embed_rows(found.model, make.texts(texts))
    for place, text in enumerate(texts):
        alone = embed_rows(found.model, make.texts([text]))[0]
        torch.testing.assert_close(both[place][: len(alone)] if pooling == "late" else both[place], alone)


def test_a_sample_that_lacks_a_wrong_document_is_compared_with_less() -> None:
    found = stage()
    with_none, with_one = batch(0, 1, negatives=0), batch(0, 1, negatives=1)
    assert [len(one["document_ids"]) for one in (with_none, with_one)] == [2, 4]
    assert (with_one["document_ids"] < 0).tolist() == [False, False, False, True]  # the second sample has none of its own
    queries = embed_rows(found.model, with_one["queries"][0])
    documents = embed_rows(found.model, with_one["documents"][0])
    wanted = found.model.objectives["embedding"](queries, documents[:3], with_one["query_ids"], with_one["document_ids"][:3])
    torch.testing.assert_close(found.losses(with_one), wanted)


def test_rows_begin_with_the_instruction_of_queries_and_end_with_the_end_of_text() -> None:
    prepared = collator(instruction="describe the image: ").prepare(samples()[2])
    said = [TOKENIZER.decode(one["row"]) for one in prepared["passages"]]
    wrong = "<s><img><IMG_CONTEXT></img>\na cat on green</s>"
    assert said == ["<s>describe the image: a tree and a blue cup</s>", "<s>one</s>", wrong]
    caption = collator().prepare({"image": picture(0), "caption": "a dog", "key": "x"})
    assert [TOKENIZER.decode(one["row"]) for one in caption["passages"]] == ["<s>a dog</s>", "<s><img><IMG_CONTEXT></img></s>"]


def test_a_long_text_loses_its_end_and_never_a_picture() -> None:
    make = collator()
    row = make.texts(["a red car " * 20])["input_ids"][0]
    assert (len(row), row[-1].item()) == (24, TOKENIZER.eos_token_id)
    late = {"query": {"text": "a " * 30 + "<image>", "images": [picture(0)]}, "positive": {"text": "a", "images": []}}
    with pytest.raises(ValueError, match=r"sample x: a picture would be cut off within max_length=24"):
        make.prepare({**late, "negatives": [], "key": "x"})


def test_a_wrong_document_that_reads_as_the_right_one_is_named() -> None:
    sample = {**samples()[0], "negatives": [{"text": "<image>", "images": [picture(0)]}], "key": "pairs.jsonl:7"}
    with pytest.raises(BadSample, match=r"sample pairs\.jsonl:7: negative 0 reads as the positive"):
        collator().prepare(sample)
