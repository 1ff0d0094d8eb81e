"""Embeddings that a decoder makes of rows.

Letters: R rows, L length, E width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_internvl.choices import EMBEDDING
from lightning_internvl.model.vlm import VLM


def embed_rows(model: VLM, rows: Mapping[str, Any]) -> Tensor:
    """Texts and pictures, as `VLM.hidden_states` takes them, as the objective `embedding` pools their
    states: (R, E), or (R, L, E) with a vector a token."""
    expanded = model.expand(rows["input_ids"], rows["attention_mask"], None, rows.get("pixel_values"))
    objective: Any = model.objectives[EMBEDDING]
    return objective.embed(model.hidden_states(**rows).hidden, expanded.attention_mask)
