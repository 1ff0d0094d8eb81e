"""Settings of how parts run: those given as one word for all parts or by part (`compile: true`,
`compile: {decoder: true}`), and the feature cache of a stage; and which entries of a pipeline
train.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lightning_internvl.messages import did_you_mean, number_faults

Config = dict[str, Any]
Width = TypeVar("Width", int, int | None)
IGNORE_INDEX = -100  # label of what no loss judges, as PyTorch's cross-entropy has it
NOTHING = -1  # the number of a document that is not there
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
EMBEDDING = "embedding"  # the objective by which a decoder embeds pairs
LATE = "late"  # interaction: an embedding is a vector a token
POOLINGS = ("last", "mean", LATE)  # of a decoder's states to an embedding
LATE_WIDTH = 128  # of these vectors, as in ColBERT and ColPali
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


def embeds_pairs(stage: Mapping[str, Any]) -> bool:
    """Whether a stage's pairs are read by the decoder, which embeds them."""
    return EMBEDDING in (stage.get("objectives") or {})


def embedding_width(pooling: str, width: int | None, decoder_dim: Width) -> int | Width:
    """Numbers of an embedding; None where it is as wide as a decoder whose width is not known yet."""
    return width or (LATE_WIDTH if pooling == LATE else decoder_dim)


def embedding_faults(objective: Mapping[str, Any], decoder_dim: int | None) -> Iterator[str]:
    """What is wrong with the sizes of embeddings (see `objectives.embedding`).

    Args:
        decoder_dim: the decoder's width; None where it is not known yet.
    """
    pooling, width = objective.get("pooling", "last"), objective.get("width")
    if pooling not in POOLINGS:
        yield f"pooling={pooling!r} is not known; valid choices: {', '.join(POOLINGS)}"
        return
    if width is not None and (faults := list(number_faults("width", width, above=0, whole=True))):
        yield from faults
        return
    widths: Sequence[Any] = objective.get("widths") or ()
    whole = embedding_width(pooling, width, decoder_dim)
    whose = "the embedding's" if width or pooling == LATE else "the decoder's"
    for one in widths:
        if whole is not None and not (isinstance(one, int) and 0 < one < whole):
            yield f"widths={list(widths)}: {one} must be a whole number above 0 and below {whole}, which is {whose} own width"
    if len(set(widths)) < len(widths):
        yield f"widths={list(widths)} names one twice"
    weights = objective.get("width_weights")
    if weights is not None and len(weights) != len(widths):
        yield f"width_weights={list(weights)} must be one for each of widths={list(widths)}"
