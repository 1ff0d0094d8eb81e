"""Every encoder with every middleware at toy size, decoders taking turns so that each meets every encoder and every middleware:
one training step and one answer, or the reason why not."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import StageSettings, stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.inference.collators import make_view
from lightning_internvl.model.compose import compose_model
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives import NextToken


def toys(group: str, *others: str) -> list[str]:
    """Parts of a group at toy size, and those that have no size of their own."""
    return sorted({path.stem for path in (CONF / group).glob("*_toy.yaml")} | set(others))


ENCODERS = toys("encoder")
MIDDLEWARES = toys(
    "middleware", "concat", "linear", "mlp", "anyres_mlp", "pixel_shuffle_mlp", "patch_merger", "hybrid_mlp", "linear_probe"
)
DECODERS = toys("decoder")
ANY_RESOLUTION = ("qwen2_vit_toy", "qwen2_5_vit_toy", "qwen3_vit_toy")
PROCESSORS = {**dict.fromkeys(ANY_RESOLUTION, "any_resolution"), "deepseek_hybrid_toy": "padded_pair"}
SIZES = {
    **{name: ["data.processor.patch_size=${encoder.patch_size}", "data.processor.min_pixels=2304"] for name in ANY_RESOLUTION},
    "deepseek_hybrid_toy": [],
}
HANDS_NOTHING = {"clip_text_toy", "linear_probe"}


def reason(encoder: str, middleware: str, decoder: str) -> str | None:
    """What the program says of parts that do not fit; None for those that do."""
    if KINDS.get(encoder) != KINDS.get(middleware):
        return "do not fit"
    if middleware == "clip_text_toy" and encoder in NO_SUMMARY:
        return "puts no token before its patches"
    if (encoder in ANY_RESOLUTION or middleware == "anyres_mlp") and decoder == "flamingo_toy":
        return "attends to equally many tokens"
    if encoder in ("sam_toy", "clip_resnet_toy") and middleware == "deepstack_toy":
        return "gives its last map"
    if middleware.startswith("deepstack") and decoder in ("flamingo_toy", "t5_toy"):
        return "does not take visual tokens into its blocks"
    return "hands nothing to a decoder" if middleware in HANDS_NOTHING else None


KINDS = {
    **dict.fromkeys((*ANY_RESOLUTION, "patch_merger", "deepstack_merger_toy"), "blocks"),
    **dict.fromkeys(("deepseek_hybrid_toy", "hybrid_mlp"), "pair"),
}  # fmt: skip
NO_SUMMARY = {"siglip_chat_toy", "openclip_toy", "sam_toy", "deepseek_hybrid_toy"}


def decoder_of(encoder: str, middleware: str) -> str:
    """Decoders in turn, along each row and each column of the table of encoders and middlewares."""
    return DECODERS[(ENCODERS.index(encoder) + MIDDLEWARES.index(middleware)) % len(DECODERS)]


def settings(encoder: str, middleware: str, decoder: str) -> StageSettings:
    """A supervised stage of three parts."""
    words = [f"encoder={encoder}", f"middleware={middleware}", f"decoder={decoder}", "pipeline=[supervised]", "paths.run=unused"]
    processor = PROCESSORS.get(encoder, "best_grid" if middleware == "anyres_mlp" else "squash")
    words += [f"processor@data.processor={processor}", *SIZES.get(encoder, [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=words)
    return stage_settings(OmegaConf.to_container(composed, resolve=True), "supervised")


def step_and_answer(encoder: str, middleware: str, decoder: str) -> None:
    torch.manual_seed(0)
    stage = settings(encoder, middleware, decoder)
    model, tokenizers = compose_model(stage.parts.config, build)
    chats = make_view(stage, model, tokenizers, build).training
    data = build(stage.data.chats)
    model.train()
    hidden, labels = model.hidden_states(**chats([data[0], data[1]]))
    loss = NextToken()(hidden, labels, model.decoder.head, shifts=shifts_labels(model.decoder))
    loss.backward()
    assert loss.isfinite()
    closed = decoder == "flamingo_toy"  # its gates start at zero, so that nothing before them moves in the first step
    for part in (model.decoder,) if closed else (model.encoder, model.middleware, model.decoder):
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters())
    model.eval()
    asked = data[0] | {"conversation": data[0]["conversation"][:1]}
    assert model.generate(**chats.prompts([asked]), max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("middleware", MIDDLEWARES)
def test_parts_compose(encoder: str, middleware: str) -> None:
    decoder = decoder_of(encoder, middleware)
    if expected := reason(encoder, middleware, decoder):
        with pytest.raises(ValueError, match=expected):
            step_and_answer(encoder, middleware, decoder)
    else:
        step_and_answer(encoder, middleware, decoder)


def test_every_pair_of_parts_meets() -> None:
    tried = [(e, m, decoder_of(e, m)) for e in ENCODERS for m in MIDDLEWARES]
    assert {(e, d) for e, _, d in tried} == {(e, d) for e in ENCODERS for d in DECODERS}
    assert {(m, d) for _, m, d in tried} == {(m, d) for m in MIDDLEWARES for d in DECODERS}
