"""What the key-value cache saves: seconds for the same tokens with it and without, by QLLaMA and by a decoder of Hugging Face.

python benchmarks/generation.py                                  # 64 tokens, one token after the other and with 5 beams
python benchmarks/generation.py tokens=30 dim=768 depth=12 beams=1

Weights are random and no end token is allowed, so that every row writes to the end. Both sides take turns, `repeats` times, and
the medians count. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.middleware.beam_search import write
from lightning_internvl.middleware.qllama import QLLaMA

SETTINGS = {
    "tokens": 64,
    "batch": 1,
    "dim": 512,
    "depth": 8,
    "queries": 96,
    "prompt": 8,
    "vocabulary": 8000,
    "beams": 5,
    "repeats": 3,
}
VISUAL_DIM, VISUAL_TOKENS = 384, 257
EOS = 2

Write = Callable[[bool, int], Tensor]  # (use_cache, beams) -> new ids


def qllama_writer(settings: dict[str, int]) -> Write:
    """Captions of a QLLaMA."""
    dim, rows, tokens = settings["dim"], settings["batch"], settings["tokens"]
    model = QLLaMA(
        encoder_dim=VISUAL_DIM, vocab_size=settings["vocabulary"], dim=dim, depth=settings["depth"], heads=dim // 64,
        mlp_dim=dim * 11 // 4, num_queries=settings["queries"], embed_dim=64, pool_heads=4,
    ).eval()  # fmt: skip
    visual, prompt = torch.randn(rows, VISUAL_TOKENS, VISUAL_DIM), torch.randint(3, 99, (rows, settings["prompt"]))

    def caption(use_cache: bool, beams: int) -> Tensor:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return model.generate(visual, prompt, eos_id=EOS, use_cache=use_cache, num_beams=beams, **lengths)

    return caption


class Recomputing:
    """A decoder that reads everything again for every token; transformers itself always caches after embeddings."""

    def __init__(self, decoder: HFCausalLM, embeds_RLH: Tensor) -> None:
        self.decoder, self.embeds = decoder, embeds_RLH

    def __call__(self, ids_RL: Tensor) -> Tensor:
        embeds = torch.cat([self.embeds, self.decoder.embed(ids_RL[:, 1:])], dim=1)
        return self.decoder.head(self.decoder.hidden(embeds, torch.ones(embeds.shape[:2], dtype=torch.long))[:, -1])

    def reorder(self, rows_S: Tensor) -> None:
        self.embeds = self.embeds[rows_S]


def decoder_writer(settings: dict[str, int]) -> Write:
    """Answers of a LLaMA of the same size after as many embeddings."""
    dim, rows, tokens = settings["dim"], settings["batch"], settings["tokens"]
    config = {
        "model_type": "llama", "hidden_size": dim, "intermediate_size": dim * 11 // 4, "num_hidden_layers": settings["depth"],
        "num_attention_heads": dim // 64, "vocab_size": settings["vocabulary"],
    }  # fmt: skip
    model = HFCausalLM(config=config).eval()
    length = settings["queries"] + settings["prompt"]
    embeds, mask = torch.randn(rows, length, dim) * 0.02, torch.ones(rows, length, dtype=torch.long)

    def answer(use_cache: bool, beams: int) -> Tensor:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": beams}
        if use_cache:
            return model.generate(embeds, mask, do_sample=False, eos_token_id=EOS, pad_token_id=EOS, **lengths)
        return write(Recomputing(model, embeds), torch.zeros(rows, 1, dtype=torch.long), eos_id=EOS, **lengths)

    return answer


def measure(writer: Write, beams: int, repeats: int) -> dict[str, float | bool]:
    """Median seconds of both sides, their ratio, and whether they wrote the same."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    written: dict[bool, Tensor] = {}
    writer(True, beams)  # warms up
    for _ in range(repeats):
        for use_cache, times in seconds.items():
            begun = time.perf_counter()
            written[use_cache] = writer(use_cache, beams)
            times.append(time.perf_counter() - begun)
    cached, recomputed = (statistics.median(seconds[use_cache]) for use_cache in (True, False))
    return {
        "cached_s": round(cached, 3),
        "recomputed_s": round(recomputed, 3),
        "ratio": round(recomputed / cached, 2),
        "same_tokens": written[True].equal(written[False]),
    }


def main(arguments: list[str]) -> None:
    """Read `name=number` settings, measure, print one JSON line."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := set(given) - set(SETTINGS):
        raise ValueError(f"unknown settings {sorted(unknown)}; valid choices: {', '.join(SETTINGS)}")
    settings = SETTINGS | {name: int(value) for name, value in given.items()}
    torch.manual_seed(0)
    found = {}
    for name, made in {"qllama": qllama_writer, "decoder": decoder_writer}.items():
        writer = made(settings)
        for beams in sorted({1, settings["beams"]}):
            found[f"{name}_greedy" if beams == 1 else f"{name}_beams"] = measure(writer, beams, settings["repeats"])
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), **settings}
    print(json.dumps({"benchmark": "generation", **about, "results": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
