"""Packed rows: each sample reads as it does alone, and no other one has any part in it, in every decoder and backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_internvl.decoders.flamingo import FlamingoCausalLM
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.decoders.plora import PartialLoRACausalLM
from lightning_internvl.decoders.qwen import Qwen
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers import attention
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.layers.hf_attention import OURS
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM

SIZES = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, **SIZES}
QWEN = {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": False, **SIZES}
MROPE = {"model_type": "qwen2_vl_text", "num_key_value_heads": 2, **SIZES,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}}  # fmt: skip
OPT = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 64, "dropout": 0.0, **SIZES}
DECODERS: dict[str, tuple[type[HFCausalLM], dict[str, Any]]] = {
    "llama": (HFCausalLM, {"config": LLAMA}),
    "opt": (HFCausalLM, {"config": OPT}),
    "mistral": (HFCausalLM, {"config": LLAMA | {"model_type": "mistral", "sliding_window": 8}}),
    "gpt_neox": (HFCausalLM, {"config": SIZES | {"model_type": "gpt_neox"}}),
    "qwen": (Qwen, {"config": QWEN, "seq_length": 8}),
    "mrope": (MRopeCausalLM, {"config": MROPE}),
    "plora": (PartialLoRACausalLM, {"config": LLAMA, "rank": 4, "alpha": 6}),
    "flamingo": (FlamingoCausalLM, {"config": LLAMA, "encoder_dim": 16, "heads": 2, "head_dim": 8, "gate": 1.0}),
    "flamingo, all": (
        FlamingoCausalLM,
        {"config": LLAMA, "encoder_dim": 16, "heads": 2, "head_dim": 8, "gate": 1.0, "all_before": True},
    ),
}
# Where the visual tokens of each sample stand.
SAMPLES = ([0, 1, 1, 1, 1, 0], [0] * 4, [1, 1, 1, 1, 0, 0, 0], [0] * 3)
ROWS, LENGTH = [[0, 1], [2, 3]], 12


@pytest.fixture(autouse=True)
def restore_backend() -> Iterator[None]:
    before = attention._asked, attention._backend
    yield
    attention._asked, attention._backend = before


def make(name: str) -> HFCausalLM:
    torch.manual_seed(0)
    kind, settings = DECODERS[name]
    decoder = kind(**settings).eval()
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():  # so that attention and updates have something to decide
            if any(part in parameter_name for part in ("q_proj", "k_proj", "query_key_value.weight", ".plora.")):
                parameter.normal_(std=0.3)
    return decoder


def samples() -> list[Tensor]:
    """The embeddings of each, (length, H)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(places), 64, generator=generator) for places in SAMPLES]


def inputs(decoder: HFCausalLM, rows: list[list[int]], length: int, device: str = "cpu") -> dict[str, Any]:
    """What a decoder reads of the given samples beside embeddings and mask."""
    places = torch.tensor([[*(place for i in row for place in SAMPLES[i]), *[0] * length][:length] for row in rows]).bool()
    seen = [i for row in rows for i in row if any(SAMPLES[i])]
    pictures = torch.randn(len(SAMPLES), 4, 3, 16, generator=torch.Generator().manual_seed(2))
    known = {"visual_places": places.to(device), "image_grid_thw": [(1, 4, 4)] * len(seen)}
    known["visual"] = torch.cat([pictures[i] for i in seen]).to(device) if seen else None
    return {name: known[name] for name in decoder.inputs if name in known}


def together(decoder: HFCausalLM, embeds: list[Tensor]) -> list[Tensor]:
    """The states of each sample, read in packed rows."""
    device = embeds[0].device
    packed = torch.stack([torch.cat([*(embeds[i] for i in row), embeds[0].new_ones(LENGTH, 64)])[:LENGTH] for row in ROWS])
    segments = [[len(SAMPLES[i]) for i in row] for row in ROWS]
    mask = torch.tensor([[1] * sum(row) + [0] * (LENGTH - sum(row)) for row in segments]).to(device)
    out = decoder.hidden(packed, mask, segments=segments, **inputs(decoder, ROWS, LENGTH, device.type))
    parts = [out[row].split([*lengths, LENGTH - sum(lengths)])[:-1] for row, lengths in enumerate(segments)]
    return [part for row in parts for part in row]


def alone(decoder: HFCausalLM, embeds: Tensor, index: int) -> Tensor:
    mask = torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device)
    return decoder.hidden(embeds[None], mask, **inputs(decoder, [[index]], len(embeds), embeds.device.type))[0]


decoders = pytest.mark.parametrize("name", DECODERS)
backends = pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])


@decoders
@backends
def test_each_sample_reads_as_it_does_alone(name: str, backend: str) -> None:
    choose_backend(backend)
    decoder, embeds = make(name), [x.requires_grad_() for x in samples()]
    weights = [torch.randn(len(x), 64) for x in embeds]
    found = together(decoder, embeds)
    expected = [alone(decoder, x, index) for index, x in enumerate(embeds)]
    logits = zip((decoder.head(x) for x in found), (decoder.head(x) for x in expected), strict=True)
    for ours, reference in logits:
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(states, weights, strict=True)), embeds)
        for states in (found, expected)
    ]
    for ours, reference in zip(*gradients, strict=True):
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


@decoders
@backends
def test_no_sample_has_a_part_in_another(name: str, backend: str) -> None:
    choose_backend(backend)
    decoder, embeds = make(name), samples()
    with torch.no_grad():
        before = together(decoder, embeds)
        for changed in range(len(embeds)):
            others = [x + 3.0 * (index == changed) for index, x in enumerate(embeds)]
            after = together(decoder, others)
            same = [torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True)]
            assert same == [index != changed for index in range(len(embeds))]


@pytest.mark.parametrize("name", ["llama", "opt", "qwen", "mrope"])
def test_rows_that_are_not_packed_stay_what_they_were(name: str) -> None:
    decoder = make(name)
    embeds, mask = torch.randn(2, 9, 64), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    own = decoder.lm.config._attn_implementation
    before = decoder.hidden(embeds, mask)
    assert own != OURS  # what the library chose
    together(decoder, samples())
    assert torch.equal(decoder.hidden(embeds, mask), before)


@pytest.mark.parametrize("name", ["llama", "opt", "mrope", "t5"])
def test_a_backend_that_was_asked_for_computes_padded_rows_too(name: str) -> None:
    """T5 too, whose encoder and decoder have configurations of their own."""
    config = {"model_type": "t5", "d_model": 64, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    found = []
    for backend in ("auto", "sdpa", "math"):
        choose_backend(backend)
        torch.manual_seed(0)
        decoder = make(name) if name != "t5" else HFSeq2SeqLM(config=config).eval()
        names = {part.config._attn_implementation for part in decoder.lm.modules() if hasattr(part, "config")}
        assert names == ({"sdpa"} if backend == "auto" else {OURS})
        mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
        torch.manual_seed(1)
        labels = {"labels": torch.randint(3, 50, (2, 4))} if name == "t5" else {}
        states = decoder.hidden(torch.randn(2, 9, 64), mask, **labels)
        found.append(states if name == "t5" else states * mask[..., None])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_recomputed_blocks_read_the_same_rows() -> None:
    gradients = []
    for recompute in (False, True):
        decoder, embeds = make("llama").train(), [x.requires_grad_() for x in samples()]
        if recompute:
            decoder.lm.activation_checkpointing_enable()
        gradients.append(torch.autograd.grad(sum(x.square().sum() for x in together(decoder, embeds)), embeds))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def test_writing_goes_on_after_packed_rows() -> None:
    decoder = make("llama")
    prompt, mask = torch.randn(2, 5, 64), torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = decoder.generate(prompt, mask, **options)
    together(decoder, samples())
    assert torch.equal(decoder.generate(prompt, mask, **options), before)


class Squares(TorchDispatchMode):
    """Collects results with two dimensions of a length or more."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.found += [(func, shape) for shape in shapes if sum(n >= self.length for n in shape) > 1]
        return out


@pytest.mark.parametrize(("backend", "some"), [("sdpa", False), ("math", True)])
def test_no_square_of_a_packed_row_is_made(backend: str, some: bool) -> None:
    """Not even of a sample: the longest has 90 tokens."""
    choose_backend(backend)
    config = LLAMA | {"max_position_embeddings": 256, "vocab_size": 60}
    decoder, embeds = HFCausalLM(config=config), torch.randn(2, 200, 64, requires_grad=True)
    mask = (torch.arange(200) < torch.tensor([[200], [150]])).long()
    with Squares(80) as squares:
        decoder.hidden(embeds, mask, segments=[[90, 85, 25], [80, 70]]).sum().backward()
    assert bool(squares.found) is some, squares.found


def test_positions_of_three_streams_begin_anew_in_each_sample() -> None:
    """Rotary positions are relative, so that states alone would not tell."""
    decoder = make("mrope")
    lengths = [len(places) for places in SAMPLES]
    segments, mask = [[lengths[i] for i in row] for row in ROWS], torch.tensor([[1] * 10 + [0] * 2] * 2)
    found = decoder.positions(mask, **inputs(decoder, ROWS, LENGTH), segments=segments)
    for row, indices in enumerate(ROWS):
        single = [decoder.positions(mask[:1, : lengths[i]], **inputs(decoder, [[i]], lengths[i]))[:, 0] for i in indices]
        assert torch.equal(found[:, row], torch.cat([*single, torch.zeros(3, 2, dtype=torch.long)], dim=1))


def refused(decoder: HFCausalLM, segments: list[list[int]], mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.hidden(torch.randn(*mask.shape, decoder.dim), mask, segments=segments)


def test_decoders_that_would_mix_samples_are_refused() -> None:
    full = torch.ones(1, 9, dtype=torch.long)
    mpt = HFCausalLM(config={"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 1, "vocab_size": 50})
    refused(mpt, [[4, 5]], full, "model_type='mpt' has an attention of its own.*data.packing=null")
    lfm = {"model_type": "lfm2", "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], **SIZES}
    refused(HFCausalLM(config=lfm), [[4, 5]], full, "model_type='lfm2' has layers of conv")
    refused(make("mistral"), [[9]], full, "a packed sample of 9 tokens is longer than the decoder's sliding window of 8")
    refused(make("qwen"), [[9]], full, "a packed sample of 9 tokens is longer than decoder.seq_length=8")
    assert make("qwen").train().hidden(torch.randn(1, 9, 64), full, segments=[[9]]).shape == (1, 9, 64)


@decoders
def test_segments_that_do_not_fit_are_named(name: str) -> None:
    decoder, mask = make(name), torch.tensor([[1, 1, 1, 1, 1, 0]])
    refused(decoder, [[4, 3]], mask, r"segments of row 0 are \[4, 3\].*at most 6")
    refused(decoder, [[2, 2]], mask, r"sum to \[4\] tokens, but their attention_mask has \[5\]")
    refused(decoder, [[5], [1]], mask, "the batch has 1 rows, but segments of 2")


def vlm(decoder: HFCausalLM) -> VLM:
    torch.manual_seed(0)
    encoder = InternViT(image_size=8, patch_size=4, dim=16, depth=1, heads=2, mlp_dim=24, init_std=0.2)
    return VLM(encoder, MLPConnector(encoder_dim=16, decoder_dim=64), decoder, image_token_id=49).eval()


def test_packed_loss_is_padded_loss_though_first_tokens_are_labelled() -> None:
    """No state of a sample judges the first token of the next, as no state judges the first token of a row."""
    model, pixels = vlm(make("llama")), torch.randn(2, 3, 8, 8)
    image = [49] * model.placeholders()
    rows = [[5, *image, 6, 7, 8], [9, 10, 11, 12], [13, *image, 14]]
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    packed = torch.tensor([sum(rows, [])])  # noqa: RUF017 - three rows
    labels = [ids.masked_fill((ids == 49) | (ids == 0), -100) for ids in (padded, packed)]
    expected = model(padded, mask, pixels, labels[0]).loss
    segments = [[len(row) for row in rows]]
    found = model(packed, torch.ones_like(packed), pixels, labels[1], segments=segments).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (found, expected)]
    flat = [torch.cat([g.flatten() for g in grads if g is not None]) for grads in gradients]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.999999


def test_a_decoder_without_packed_rows_is_refused() -> None:
    config = {"model_type": "t5", "d_model": 64, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    ids = torch.randint(3, 40, (1, 6))
    with pytest.raises(ValueError, match=r"HFSeq2SeqLM reads no packed rows; set data\.packing=null"):
        vlm(HFSeq2SeqLM(config=config)).hidden_states(ids, torch.ones_like(ids), labels=ids, segments=[[3, 3]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@decoders
@pytest.mark.parametrize("backend", ["xformers", "flash", "flex", "sdpa"])
def test_on_a_gpu_samples_read_as_alone_and_the_host_never_waits(name: str, backend: str) -> None:
    try:
        choose_backend(backend, "cuda", torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    decoder = make(name).to("cuda", torch.bfloat16)
    embeds = [x.to("cuda", torch.bfloat16) for x in samples()]
    expected = [alone(decoder, x, index) for index, x in enumerate(embeds)]
    found = together(decoder, embeds)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=5e-2, atol=5e-2)
    changed = together(decoder, [embeds[0] + 3.0, *embeds[1:]])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(changed[1:], found[1:], strict=True))
    if name in ("llama", "opt"):
        rows, mask = torch.randn(2, 12, 64, device="cuda", dtype=torch.bfloat16), torch.ones(2, 12, device="cuda").long()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.hidden(rows, mask, segments=[[7, 5], [12]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
