"""An exported folder read back by what will load it, beside the model that was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.export import check
from lightning_internvl.hub import quiet
from lightning_internvl.model.vlm import VLM


def check_reloaded(
    draft: Path,
    layout: Layout | None,
    config: Config,
    view: Any,
    prompts: list[Any],
    reference: list[Any],
    options: Mapping[str, Any],
) -> tuple[dict[str, float], list[str], str]:
    """Differences by prompt, the prompts that the other class does not take, and its name.

    Args:
        options: of `generate`.

    Raises:
        ValueError: for logits that differ, or other greedy ids.
    """
    model = view.model
    if layout is not None and layout.NATIVE:
        stock = load_stock(draft, config, model)
        found = [check.stock_outputs(stock, model, prompt, options) for prompt in prompts]
        loader = f"transformers.{type(stock).__name__}"
    else:
        again = load_pretrained(draft, dtype=torch.float32)
        again.image_token_id, again.image_placeholders = model.image_token_id, model.image_placeholders
        found = [check.model_outputs(again, prompt, options) for prompt in prompts]
        loader = "lightning_internvl.load_pretrained (transformers has no class for it)"
    return *check.check_outputs(prompts, reference, found), loader


def load_stock(folder: Path, config: Config, model: VLM) -> nn.Module:
    """The class of transformers for a folder, in float32, after it has taken every tensor.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape.
    """
    auto: Any = AutoModelForImageTextToText
    if model.decoder is None:
        auto = getattr(transformers, config["architectures"][0])
    loading = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    with quiet():
        stock, report = auto.from_pretrained(folder, **loading)
    check.check_loading(report, tied=getattr(model.decoder, "tied", False))
    return stock.eval()
