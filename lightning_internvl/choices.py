"""Settings of how parts run: those given as one word for all parts or by part (`compile: true`,
`compile: {decoder: true}`), and the feature cache of a stage; and which entries of a pipeline
train.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_internvl.messages import did_you_mean, number_faults

Config = dict[str, Any]
IGNORE_INDEX = -100  # label of what no loss judges, as PyTorch's cross-entropy has it
INHERITED = "inherited"  # parts, and how they read, from where a stage starts
PRODUCTS = ("highest", "high", "medium")  # how exactly a GPU multiplies matrices of float32
BACKENDS = ("auto", "xformers", "flash", "flex", "sdpa", "math")  # of attention
# what data.packing may say
PACKINGS = {None: None, False: None, True: "packed", "packed": "packed", "bucketed": "bucketed"}
METHODS = {"peft": ("lora", "dora"), "quantization": ("nf4", "int8", "bf16")}
BY_SIZE = {"size": 1.0, "sqrt": 0.5}  # weights of datasets by their lengths, and the power of these

SWEEP = "sweep"  # where finished stages are looked for

PARTS = ("encoder", "middleware", "decoder")
GIVEN_PARTS = ("encoder", "decoder")  # that files may lack and only name
BLOCKWISE: dict[str, tuple[str | bool, ...]] = {  # and their words, beside null
    "activation_checkpointing": ("full", "selective"),
    "compile": (True, "auto", "inductor", "aot_eager", "eager"),
}
CACHES = {"memory": "{where: memory, gib: 4}", "disk": "{where: disk, gib: 100, path: FOLDER}"}


def is_step(stage: Mapping[str, Any]) -> bool:
    """Whether an entry of `stages` is a step that trains nothing (see `filtering`)."""
    return "step" in stage


def trained_stages(config: Mapping[str, Any]) -> list[str]:
    """The names in the pipeline of a configuration that train."""
    return [name for name in config["pipeline"] if not is_step(config["stages"][name])]


def by_part(value: Any) -> dict[str, Any]:
    """A setting by part; null says nothing about any, false turns it off for all."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(PARTS, value)


def block_settings(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of `BLOCKWISE` for one stage: its own over the common ones."""
    return {name: by_part(common.get(name)) | by_part(own.get(name)) for name in BLOCKWISE}


def block_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the settings of `BLOCKWISE`."""
    for name, words in BLOCKWISE.items():
        choices = ", ".join("true" if word is True else str(word) for word in words)
        for part, word in by_part(settings.get(name)).items():
            if part not in PARTS:
                yield f"{name}: there is no part {part!r}; valid choices: {', '.join(PARTS)}"
            elif word and not (isinstance(word, str | bool) and word in words):
                where = f"{name}.{part}" if isinstance(settings[name], Mapping) else name
                yield f"{where}={word!r} is not known; valid choices: null, {choices}, or one of them by part"


def cache_faults(cache: Any) -> Iterator[str]:
    """What is wrong with a stage's `feature_cache`."""
    if cache is None:
        return
    if not isinstance(cache, Mapping) or cache.get("where") not in CACHES:
        yield f"feature_cache={cache!r} is not known; valid choices: null, {', '.join(CACHES.values())}"
        return
    for name in cache.keys() - {"where", "gib", "path"}:
        yield f"feature_cache: there is no setting {name!r}; {did_you_mean(name, ('where', 'gib', 'path'))}"
    most = ", the most GiB that it may take"
    yield from number_faults("feature_cache.gib", cache.get("gib"), above=0, note=most)
    if (cache["where"] == "disk") != bool(cache.get("path")):
        both = "a path belongs to where=disk, and where=disk needs one"
        yield f"feature_cache={dict(cache)}: {both}; as in {CACHES['disk']}"
