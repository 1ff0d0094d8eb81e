"""What OpenFlamingo's released files leave out: the parts that were frozen in training, taken from
a CLIP and a language model as these are published."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import CONFIG_MAPPING

from lightning_internvl.checkpoints.families import open_clip
from lightning_internvl.checkpoints.families.clip import tower_names
from lightning_internvl.checkpoints.name_rules import Config, Shapes
from lightning_internvl.checkpoints.tied_tables import FIELD
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.data.tokenizer import saved_tokenizer
from lightning_internvl.hub import NOTES

# Where each language model keeps its blocks.
BLOCKS = {
    "mpt": "transformer.blocks", "llama": "model.layers", "opt": "model.decoder.layers",
    "gptj": "transformer.h", "gpt_neo": "transformer.h", "gpt_neox": "gpt_neox.layers",
    "qwen2": "model.layers", "mistral": "model.layers",
}  # fmt: skip
NEOX = BLOCKS["gpt_neox"]  # whose head has another name in its files
NEOX = BLOCKS["gpt_neox"]  # whose output table has another name in its files
LANGUAGE, TOWER = "lang_encoder.", "vision_encoder."
OUTPUTS = (f"{LANGUAGE}lm_head.", f"{LANGUAGE}embed_out.")  # tables of words at the output
TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")
# what create_model_and_transforms adds to the language model's tokenizer, in this order
ADDED = ("<|endofchunk|>", "<image>")
# towers by their names in open_clip, for OpenAI's weights
TOWERS = {
    "ViT-L-14": "openai/clip-vit-large-patch14", "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
    "ViT-B-16": "openai/clip-vit-base-patch16", "ViT-B-32": "openai/clip-vit-base-patch32",
}  # fmt: skip
# arguments of create_model_and_transforms
ENCODER, WEIGHTS, DECODER, TOKENIZER = (
    "clip_vision_encoder_path", "clip_vision_encoder_pretrained", "lang_encoder_path", "tokenizer_path",
)  # fmt: skip
CLIP_NAMES = "clip_names"  # whether the tower has transformers' names, of which a saved model has none
SOURCES = (ENCODER, WEIGHTS, DECODER, TOKENIZER, CLIP_NAMES)  # of a config whose files hold a part


def blocks_of(text: Config) -> str:
    """Where a language model keeps its blocks.

    Raises:
        ValueError: for one of another kind.
    """
    kind = text.get("model_type")
    if kind not in BLOCKS:
        raise ValueError(
            f"text_config.model_type={kind!r} is not known to OpenFlamingo's layout; valid choices: {', '.join(BLOCKS)}"
        )
    return BLOCKS[kind]


def flamingo_tower_names(there: Iterable[str]) -> dict[str, str]:
    """The tower of a CLIP under transformers' names, or OpenAI's."""
    there = [*there]
    if "visual.transformer.resblocks.0.ln_1.weight" not in there:
        return tower_names(TOWER, there)
    names = {name: TOWER + name.removeprefix("visual.") for name in there if name.startswith("visual.")}
    return {name: ours for name, ours in names.items() if ours != f"{TOWER}proj"}


def with_tower(config: Config, theirs: Config, files: WeightFiles) -> Config:
    """With the tower's config."""
    if "visual.conv1.weight" in files.shapes:
        vision = open_clip.vision_settings(open_clip.completed(theirs, files), files.shapes)
        return config | {"vision_config": vision}
    return config | {"vision_config": theirs.get("vision_config") or theirs, CLIP_NAMES: True}


def language_names(blocks: str, used: Callable[[str], bool], there: Iterable[str]) -> dict[str, str]:
    """A language model's tensors, below `blocks` those of its blocks; some releases leave the first
    word of a name out.

    Args:
        used: whether a tensor is taken, by its name below `lang_encoder`.
    """
    top = blocks.partition(".")[0]
    found: dict[str, str] = {}
    for name in there:
        whole = name if name.startswith((f"{top}.", "lm_head.", "embed_out.")) else f"{top}.{name}"
        ours = LANGUAGE + re.sub(rf"^({re.escape(blocks)}\.\d+)\.", r"\1.decoder_layer.", whole)
        ours = ours.replace(*OUTPUTS) if blocks == NEOX else ours
        if used(ours):
            found[name] = ours
    return found if any(".decoder_layer." in name for name in found.values()) else {}


def with_language(held: Shapes, config: Config, theirs: Config, files: WeightFiles) -> Config:
    """With the language model's config, the rows that its table of words gets, and the id of a
    picture's word."""
    blocks_of(theirs)
    text = {key: value for key, value in theirs.items() if key not in NOTES}
    text.setdefault(FIELD, bool(CONFIG_MAPPING[theirs["model_type"]]().tie_word_embeddings))
    own = [Path(config[TOKENIZER])] if config.get(TOKENIZER) else []
    size, media = _added_words(*own, files.files[0].parent)
    own_rows = [held[name][0] for name in tables(held)]
    rows = own_rows[0] if own_rows else max(size, text.get("vocab_size", 0))
    given = {"media_token_id": media} if media is not None and "media_token_id" not in config else {}
    return {DECODER: "", **config, **given, "text_config": text | {"vocab_size": rows}}


def _added_words(*folders: Path) -> tuple[int, int | None]:
    """Words of the tokenizer in the first of some folders that has one, with those that OpenFlamingo
    adds, and the id of a picture's; 0 and None without a tokenizer."""
    for folder in folders:
        try:
            words = saved_tokenizer(str(folder.resolve()), ADDED)
        except Exception:  # of any kind: the library does not check what it reads
            continue
        return len(words) + (words.pad_token is None), words.get_vocab()[ADDED[1]]
    return 0, None


def tables(shapes: Shapes) -> list[str]:
    """The language model's tables of words."""
    return [name for name in shapes if name.startswith(LANGUAGE) and name.endswith(TABLES)]
