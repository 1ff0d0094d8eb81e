"""Whether the tables of words of a language model, at its input and at its output, are one tensor:
what a config says of it, and what a config has to say."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.layers.basic import fill_with_mean

FIELD = "tie_word_embeddings"
SECTIONS = ("text_config", "llm_config", "language_config")  # of language models in a `config.json`


class TableRows(NamedTuple):
    """A table of words (V, D) gets `rows` of its own count: new ones are the mean of the old."""

    rows: int

    def added_to(self, table: Tensor) -> Tensor:
        """The table with so many rows."""
        known = min(self.rows, len(table))
        found = table.new_empty(self.rows, *table.shape[1:])
        found[:known] = table[:known]
        if known < self.rows:
            fill_with_mean(found, known)
        return found


def said_to_be_tied(config: Config, decoder: Any) -> bool:
    """What a `config.json` says: releases of transformers read the field at its top or in the
    language model's section, so that one word for it is enough; else what the language model's
    architecture has."""
    said = [section[FIELD] for section in _sections(config) if section.get(FIELD) is not None]
    return any(said) if said else bool(getattr(type(decoder.lm.config)(), FIELD, False))


def with_true_tie(config: Config, decoder: Any) -> Config:
    """A `config.json` that says of the tables what they are, in every place where a reader looks."""
    if not has_tables(decoder) or said_to_be_tied(config, decoder) == decoder.tied:
        return config
    sections = {key: config[key] | {FIELD: decoder.tied} for key in SECTIONS if isinstance(config.get(key), dict)}
    return config | sections | {FIELD: decoder.tied}


def has_tables(decoder: Any) -> bool:
    """Whether a decoder is a language model of transformers, which may tie its tables."""
    return hasattr(decoder, "tied") and hasattr(getattr(decoder, "lm", None), "get_output_embeddings")


def table_names(model: nn.Module, decoder: Any) -> tuple[str, str]:
    """The names in the model of the tables of words at the input and at the output."""
    tables = decoder.lm.get_input_embeddings(), decoder.lm.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    first, last = (f"{names[id(table)]}.weight" for table in tables)
    return first, last


def _sections(config: Config) -> list[Config]:
    return [config, *(config[key] for key in SECTIONS if isinstance(config.get(key), dict))]
