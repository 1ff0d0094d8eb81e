"""The most probable next tokens by an inference engine, run as a process of its own: what an engine
aborts on, allocates or prints is not the trainer's.

    python -P engine_rows.py ENGINE ASKED.json TOLD.json

ASKED: `model` (a folder, or a GGUF file), `rows` (token ids of each prompt), `count` (of tokens),
`letter` (the id of a token that is whole text).
TOLD: `by` (name and version), `rows` (for each prompt the log-probabilities by token id).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[int, float]]
Run = Callable[[str, list[list[int]], int, int], Rows]


def by_xllamacpp(model: str, rows: list[list[int]], count: int, letter: int) -> Rows:
    """llama.cpp through its server's completions, which take ids; keys and values in 32 bits. It tells
    no probabilities beside a piece of a character, so it is made to write a letter; they are those
    before that."""
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel, given.n_gpu_layers = model, len(max(rows, key=len)) + 8, 1, 0
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.warmup = given.fit_params = False
    given.verbosity = 1  # errors
    server = xllamacpp.Server(given)
    asked: dict[str, Any] = {"n_predict": 1, "temperature": 0, "n_probs": count, "post_sampling_probs": False}
    found = []
    for row in rows:
        told = server.handle_completions({"prompt": row, "logit_bias": [[letter, 1e6]], **asked})
        if "choices" not in told:
            raise RuntimeError(json.dumps(told))
        (place,) = told["choices"][0]["logprobs"]["content"]
        found.append({entry["id"]: entry["logprob"] for entry in place["top_logprobs"]})
    return found


def by_llama_cpp(model: str, rows: list[list[int]], count: int, _: int) -> Rows:
    """llama.cpp through llama-cpp-python: the logits of each prompt's last token."""
    import llama_cpp
    import numpy as np

    kept = llama_cpp.GGML_TYPE_F32
    length = len(max(rows, key=len)) + 8
    engine = llama_cpp.Llama(model, n_ctx=length, n_gpu_layers=0, logits_all=True, type_k=kept, type_v=kept, verbose=False)
    found = []
    for row in rows:
        engine.reset()
        engine.eval(row)
        logits = np.asarray(engine.scores[len(row) - 1], dtype=np.float64)
        logs = logits - np.logaddexp.reduce(logits)
        found.append({int(token): float(logs[token]) for token in np.argsort(-logs)[:count]})
    return found


def by_vllm(model: str, rows: list[list[int]], count: int, _: int) -> Rows:
    """vLLM in float32, without what a picture needs."""
    import vllm

    none = {"image": 0, "video": 0}
    engine = vllm.LLM(model=model, dtype="float32", enforce_eager=True, trust_remote_code=False, limit_mm_per_prompt=none)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=count)
    prompts: list[Any] = [{"prompt_token_ids": row} for row in rows]
    found = []
    for answer in engine.generate(prompts, greedy):
        place = answer.outputs[0].logprobs[0]
        found.append({token: entry.logprob for token, entry in place.items()})
    return found


# By the name under which each is imported; and the package that brings it.
ENGINES: dict[str, tuple[Run, str]] = {
    "xllamacpp": (by_xllamacpp, "xllamacpp"),
    "llama_cpp": (by_llama_cpp, "llama-cpp-python"),
    "vllm": (by_vllm, "vllm"),
}


def main(name: str, asked: str, told: str) -> None:
    """Read, compute, write."""
    run, package = ENGINES[name]
    given = json.loads(Path(asked).read_text(encoding="utf-8"))
    rows = run(given["model"], given["rows"], given["count"], given["letter"])
    found = {"by": f"{package} {importlib.metadata.version(package)}", "rows": rows}
    Path(told).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
