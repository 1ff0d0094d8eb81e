"""Which layout an export has."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import all_layouts, layout_of_model
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import check_choice
from lightning_internvl.model.vlm import VLM

TEXTS = "sentence_transformers"  # of the stage embed, the language model alone
OWN = "handoff"  # the layout of this project, for models that no other one holds


def choose_layout(model: VLM, key: str | None, *, final: bool = True) -> tuple[Layout | None, Config]:
    """The layout that is written, None for our own, and its `config.json`.

    Args:
        final: False before adapters have been merged, when only the name can be judged.

    Raises:
        ValueError: if the one asked for is unknown or cannot hold the model; with those that can.
    """
    folders = [name for name, layout in all_layouts().items() if not layout.SINGLE_FILE]
    if key is not None:
        check_choice("layout", key, (*folders, OWN, TEXTS))
    if key == OWN or not final:
        return None, {}
    try:
        return layout_of_model(model, key)
    except ValueError as error:
        if key is None:
            return None, {}
        able = [name for name in folders if _can_hold(model, name)]
        choices = ", ".join((*able, OWN))
        raise ValueError(f"layout={key} cannot hold this model; valid choices: {choices}") from error


def add_placeholder_row(model: VLM) -> bool:
    """Give the language model a row for the placeholder of pictures where it is a word without one,
    which is never read here; transformers reads it before the picture takes its place. Returns
    whether it did."""
    token = model.image_token_id or 0
    if model.decoder is None or token < model.decoder.vocab_size:
        return False
    model.decoder.grow(token + 1)
    return True


def _can_hold(model: VLM, key: str) -> bool:
    try:
        layout, config = layout_of_model(model, key)
        layout.official_tensors(config, own_tensors(model))
    except ValueError:
        return False
    return True
