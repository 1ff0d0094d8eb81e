"""What must hold before an exported folder appears: all tensors, and the same results.

Letters: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_internvl.checkpoints import weight_source
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config, match_rules
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.data.collate.base import pad_id, pad_rows
from lightning_internvl.data.collate.encode import TooLong
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.inference.collators import View
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import first_of
from lightning_internvl.model.vlm import VLM, shifts_labels

LIMIT = 1e-4  # of the largest value, for the same weights in float32
# For weights rounded to a type, beside those that were trained.
ROUNDING = {"float32": LIMIT, "float16": 0.02, "bfloat16": 0.1}
NEW_TOKENS = 8
QUESTIONS = ("What is in the picture?", "Where is it?", "How many things are there, and what colour is the background?")
SIZES = ((96, 128), (120, 80))  # height and width of the pictures that are shown
Outputs = tuple[Tensor, Tensor | None]  # logits, and greedy ids where something is written


@dataclass(frozen=True)
class Prompt:
    """What is compared: `inputs` of a forward pass, and the sample that they were made of."""

    name: str
    inputs: dict[str, Tensor]
    sample: dict[str, Any]


# --- prompts --------------------------------------------------------------------------------------


def sample_pictures() -> list[np.ndarray]:
    """Two pictures with edges, colours and noise, of different proportions."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in SIZES:
        rows, columns = np.mgrid[0:height, 0:width]
        squares = ((rows // 16 + columns // 16) % 2) * 2.0 - 1
        waves = np.stack([np.sin(rows / 7), np.cos(columns / 11), squares], axis=-1)
        found.append((127 + 90 * waves + rng.normal(0, 10, waves.shape)).clip(0, 255).astype(np.uint8))
    return found


def sample_prompts(view: View) -> list[Prompt]:
    """Questions with a picture and without, captions, or pictures alone: what the model reads."""
    if view.chats is not None:
        samples = [
            {"images": images, "conversation": [{"role": "user", "content": IMAGE * len(images) + "\n" * len(images) + text}]}
            for images, text in zip([[image] for image in sample_pictures()] + [[]], QUESTIONS, strict=True)
        ]
        names = ("wide picture", "tall picture", "text alone")
        prompts = [_prompt(view, name, sample) for name, sample in zip(names, samples, strict=True)]
        return [prompt for prompt in prompts if prompt is not None]
    collator = view.pairs or view.labels
    pixels = collator.pixels(sample_pictures(), ["check"] * len(SIZES))
    if view.pairs is None:
        return [Prompt("pictures", {"pixel_values": pixels}, {})]
    ids, mask = pad_rows(*view.pairs.rows("itc", QUESTIONS))
    return [Prompt("pictures and captions", {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}, {})]


def text_prompts(view: View) -> list[Prompt]:
    """Each question without a picture, of a model that writes."""
    samples = [{"images": [], "conversation": [{"role": "user", "content": text}]} for text in QUESTIONS]
    prompts = [_prompt(view, "text alone", sample) for sample in samples]
    return [prompt for prompt in prompts if prompt is not None]


def _prompt(view: View, name: str, sample: dict[str, Any]) -> Prompt | None:
    try:
        return Prompt(name, dict(view.chats.prompts([sample | {"key": "check"}])), sample)
    except TooLong:  # made for shorter texts than these
        return None


def greedy_options(view: View) -> dict[str, Any]:
    """Options of `generate` that write as many ids whatever a folder's settings say."""
    if view.chats is None:
        return {}
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    tokenizer = view.chats.tokenizer
    return length | {"pad_token_id": pad_id(tokenizer), "eos_token_id": tokenizer.eos_token_id}


# --- the same numbers -----------------------------------------------------------------------------


@torch.no_grad()
def model_outputs(model: VLM, prompt: Prompt, options: Mapping[str, Any]) -> Outputs:
    """Logits of a model of ours (of a probe, or of all pairs of pictures and texts), and the ids
    that it writes greedily."""
    if model.decoder is None:
        if "input_ids" in prompt.inputs:
            return model(**prompt.inputs).logits_per_image, None
        return model.visual_tokens(prompt.inputs["pixel_values"]), None
    return model(**model_inputs(prompt, model)).logits, model.generate(**prompt.inputs, **options)


@torch.no_grad()
def stock_outputs(stock: nn.Module, model: VLM, prompt: Prompt, options: Mapping[str, Any]) -> Outputs | None:
    """The same of a model of transformers; None where it takes no text without a picture."""
    inner = stock.get_base_model() if hasattr(stock, "get_base_model") else stock  # inside PEFT's
    takes = inspect.signature(inner.forward).parameters
    inputs = {name: tensor for name, tensor in model_inputs(prompt, model).items() if tensor.numel()}
    if "pixel_values" not in inputs and takes["pixel_values"].default is inspect.Parameter.empty:
        return None
    inputs.pop("image_grids", None)  # its class finds them by the sizes
    if "mm_token_type_ids" in takes and "input_ids" in inputs:
        ids = inputs["input_ids"]
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        for kind, token in enumerate((model.image_token_id, model.video_token_id), start=1):
            if token is not None:
                kinds[ids == token] = kind
        inputs["mm_token_type_ids"] = kinds
    if model.decoder is None:
        return stock(**inputs).logits_per_image, None
    labels = inputs.pop("labels", None)
    logits = stock(**inputs, **({} if labels is None else {"labels": labels})).logits
    return logits, stock.generate(**inputs, **options)[:, -NEW_TOKENS:]


def model_inputs(prompt: Prompt, model: VLM) -> dict[str, Tensor]:
    """An encoder-decoder answers to labels only."""
    if model.decoder is None or shifts_labels(model.decoder):
        return prompt.inputs
    return prompt.inputs | {"labels": prompt.inputs["input_ids"][:, -4:]}


def check_close(name: str, ours: Tensor, theirs: Tensor, limit: float = LIMIT) -> float:
    """The largest difference relative to the largest value.

    Raises:
        ValueError: if it is above the limit, or is no number.
    """
    try:
        return close(name, ours, theirs, limit)
    except ValueError as error:
        raise ValueError(f"the export failed its check: {error}") from error


def close(name: str, ours: Tensor, theirs: Tensor, limit: float = LIMIT) -> float:
    """The same, without a word of an export."""
    if ours.shape != theirs.shape:
        shapes = f"{tuple(theirs.shape)}, not {tuple(ours.shape)}"
        raise ValueError(f"{name} has shape {shapes}")
    difference = float((ours.float() - theirs.float()).abs().max() / ours.float().abs().max())
    if not difference <= limit:  # NaN is above every limit
        much = f"{difference:.2e} of the largest, more than {limit:.0e}"
        raise ValueError(f"{name} differ by {much}")
    return difference


def check_outputs(
    prompts: Sequence[Prompt], reference: Sequence[Outputs], found: Sequence[Outputs | None]
) -> tuple[dict[str, float], list[str]]:
    """Differences of the logits by prompt, and prompts that are not taken (None).

    Raises:
        ValueError: for logits that differ, or other greedy ids.
    """
    logits: dict[str, float] = {}
    for prompt, (ours, ids), theirs in zip(prompts, reference, found, strict=True):
        if theirs is None:
            continue
        logits[prompt.name] = check_close(f"logits ({prompt.name})", ours, theirs[0])
        if ids is None:
            continue
        written = theirs[1]
        assert written is not None  # what writes here writes there
        if not torch.equal(ids, written):
            said = f"greedy ids ({prompt.name}): {written.tolist()}, not {ids.tolist()}"
            raise ValueError(f"the export failed its check: {said}")
    return logits, [prompt.name for prompt, theirs in zip(prompts, found, strict=True) if theirs is None]


# --- every tensor ---------------------------------------------------------------------------------


def check_tensors(folder: Path, layout: Layout | None, config: Config, model: VLM) -> int:
    """Find every tensor of a model in a folder, with its values as they are in the model.

    Args:
        layout: of the folder; None for a hand-off folder.

    Returns:
        how many there are

    Raises:
        ValueError: naming those that the folder lacks, and those that have other values there.
    """
    wanted = own_tensors(model)
    there = _read_back(folder, layout, config, wanted)
    lost = [name for name in wanted if name not in there]
    changed = []
    for name in wanted:
        if name in there and not _same_values(wanted[name], there[name]):
            changed.append(name)
    kinds = {"lost": lost, "changed": changed}
    problems = [f"{len(names)} {kind}: {first_of(names, 20)}" for kind, names in kinds.items() if names]
    if problems:
        told = "; ".join(problems)
        raise ValueError(f"the export failed its check: of {len(wanted)} tensors {told}")
    return len(wanted)


def _same_values(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.to(ours.dtype))


def _read_back(
    folder: Path,
    layout: Layout | None,
    config: Config,
    wanted: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """The tensors of a folder under our names, those that are there."""
    if layout is None:
        return weight_source.read_handoff(folder)[0]
    official: dict[str, Tensor] = {}
    for name, tensor in WeightFiles(folder).tensors(torch.device("cpu")):
        if (known := layout.canonical(name)) is not None:
            official[known] = tensor
    groups, _ = match_rules(layout.rules(config), wanted)
    whole = [group for group in groups if all(name in official for name in group.official)]
    return {name: tensor for group in whole for name, tensor in group.read(official).items()}


def check_loading(report: Mapping[str, Sequence[Any]], tied: bool) -> None:
    """See that a class of transformers took every tensor and lacked none.

    Args:
        report: as `from_pretrained(..., output_loading_info=True)` gives it.
        tied: whether the output embeddings are the input embeddings, which are stored once.

    Raises:
        ValueError: naming the tensors.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in report.get(kind) or () if not (tied and "lm_head" in str(name))]
        if names:
            fault = f"{kind.replace('_', ' ')}: {first_of(names, 20)}"
            raise ValueError(f"the export failed its check: transformers finds {fault}")
