"""Tokenizer, chat template, generation settings and processor of an exported folder, compared with
what training read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from lightning_internvl.data.collate.base import pad_id
from lightning_internvl.data.processors.resize import order_of_pillow_13
from lightning_internvl.export import chat_template, check
from lightning_internvl.export.base_folder import base_folder
from lightning_internvl.export.processor_files import ProcessorFiles, processor_files
from lightning_internvl.inference.collators import View

PIXELS = 1e-4  # the most that a normalised pixel may differ
NO_CLASS = "none: transformers has no class that prepares pictures and text as this run did"
KEPT = "; the chat template is the base's own"
SEPARATE = "qformer_tokenizer"  # where InstructBLIP looks for the tokenizer of its Q-Former


@dataclass(frozen=True)
class WrittenProcessor:
    """What was written beside the weights.

    Attributes:
        kind: the processor's class; None without one.
        verdict: how it was compared with the run's own.
        stop: what ends an answer, where this is no single token that `generation_config.json` could
            name.
        videos: whether the class has a part for videos, which needs torchvision.
    """

    kind: str | None
    verdict: str
    stop: str | None
    videos: bool = False


def write_processor(
    folder: Path, layout: str, config: Mapping[str, Any], view: View, start: str | None = None
) -> WrittenProcessor:
    """Write all files beside the weights.

    Args:
        start: what the run started from, whose chat template is kept where the run has not
            changed it.

    Raises:
        ValueError: if the processor prepares other ids or other pixels than the run's collators.
    """
    files = processor_files(layout, config, view)
    collator = view.chats or view.pairs
    if collator is None:
        _write_json(folder, "preprocessor_config.json", files.image)
        return WrittenProcessor(None, NO_CLASS, None)
    collator.tokenizer.save_pretrained(folder)
    _rename_tokens(folder, files)
    instructions = view.chats and view.chats.instructions
    if files.instructed and instructions:
        instructions.tokenizer.save_pretrained(folder / SEPARATE)
        _rename_tokens(folder / SEPARATE, ProcessorFiles(None, None))
    stop = _write_chat(folder, files, view) if view.chats else None
    _write_json(folder, "preprocessor_config.json", files.image)
    _write_json(folder, "video_preprocessor_config.json", files.video)
    if files.kind is None:
        kept = bool(view.chats) and chat_template.keep_base_template(folder, base_folder(start), files, view, None)
        return WrittenProcessor(None, NO_CLASS + KEPT * kept, stop)
    _write_json(folder, "processor_config.json", {"processor_class": files.kind, **files.settings})
    processor = load_processor(folder, files)
    if not view.chats:
        verdict = compare_pairs(processor, files, view)
    else:
        verdict = compare_chats(folder, processor, files, view)
        verdict += KEPT * chat_template.keep_base_template(folder, base_folder(start), files, view, processor)
    return WrittenProcessor(files.kind, verdict, stop, files.video is not None)


def _write_json(folder: Path, name: str, fields: Mapping[str, Any] | None) -> None:
    if fields is not None:
        (folder / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rename_tokens(folder: Path, files: ProcessorFiles) -> None:
    """Give tokens the names of the processor's class: `tokenizer.image_token`, or a text."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in files.renamed.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / name).write_text(text, encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        # its name before transformers 5, still understood there
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for note in ("is_local", "local_files_only"):  # of transformers 5 about how it was read
        config.pop(note, None)
    # transformers 5 lists tokens without names under the field in which transformers 4 expects those
    # with names, and reads both as they are written here
    named = config.pop("model_specific_special_tokens", None) or {}
    extra = config.pop("extra_special_tokens", None) or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    if extra:
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    if named := named | files.tokens:
        config |= {"extra_special_tokens": named, **named}
    _write_json(folder, "tokenizer_config.json", config)


def _write_chat(folder: Path, files: ProcessorFiles, view: View) -> str | None:
    """`chat_template.jinja`, `generation_config.json`; what ends an answer, if no token."""
    chats = view.chats
    (folder / chat_template.NAME).write_text(chat_template.own_template(files, view), encoding="utf-8")
    tokenizer, end = chats.tokenizer, chats.template.end(chats.tokenizer.eos_token or "")
    written = tokenizer.encode(end, add_special_tokens=False)
    ids = list(dict.fromkeys([*(written if len(written) == 1 else []), tokenizer.eos_token_id]))
    lm = getattr(view.model.decoder, "lm", None)
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ids[0] if len(ids) == 1 else ids,
        "pad_token_id": pad_id(chats.tokenizer),
        "decoder_start_token_id": getattr(getattr(lm, "config", None), "decoder_start_token_id", None),
        "do_sample": False,
    }
    _write_json(folder, "generation_config.json", {name: value for name, value in settings.items() if value is not None})
    return None if len(written) == 1 else end


# --- compared with training -----------------------------------------------------------------------


def load_processor(folder: Path, files: ProcessorFiles) -> Any:
    """The processor's class with its parts. The part that prepares videos needs torchvision; here
    pictures do without it."""
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False),
        "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    }
    if files.instructed:
        parts["qformer_tokenizer"] = AutoTokenizer.from_pretrained(folder / SEPARATE, trust_remote_code=False)
    assert files.kind is not None  # without a class nothing is read back
    kind = getattr(transformers, files.kind)
    if files.video is not None and not is_torchvision_available():
        # The class asks for the type of each part, and there is none of the part that is left out.
        kind = type(files.kind, (kind,), {"check_argument_for_proper_class": lambda self, name, part: type(part)})
    return kind(**parts, **files.settings)


def compare_chats(folder: Path, processor: Any, files: ProcessorFiles, view: View) -> str:
    """Prompts as the processor prepares them beside those of the run.

    Raises:
        ValueError: for other ids, or other pixels.
    """
    template = (folder / chat_template.NAME).read_text(encoding="utf-8")
    worst, prompts = 0.0, check.sample_prompts(view)
    for prompt in prompts:
        messages = prompt.sample["conversation"]
        text = processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        images = [Image.fromarray(image) for image in prompt.sample["images"]] or None
        with order_of_pillow_13():
            theirs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        if "image_grids" in prompt.inputs and images:
            theirs["pixel_values"] = _squares(theirs["pixel_values"], prompt.inputs["image_grids"].tolist())
        if theirs["input_ids"].tolist() != prompt.inputs["input_ids"].tolist():
            raise ValueError(
                f"the export failed its check: {files.kind} makes other ids of {prompt.name!r} than training: "
                f"{theirs['input_ids'][0].tolist()}, not {prompt.inputs['input_ids'][0].tolist()}"
            )
        worst = max(
            worst,
            *(_pixel_difference(prompt.name, prompt.inputs, theirs, n) for n in _visual_inputs(prompt.inputs) if images),
            0.0,
        )
    return f"{files.kind}: same ids for {len(prompts)} prompts, pixels within {worst:.1e}"


def compare_pairs(processor: Any, files: ProcessorFiles, view: View) -> str:
    """Pictures as the processor prepares them beside those of the run."""
    prompt = check.sample_prompts(view)[0]
    pictures = [Image.fromarray(image) for image in check.sample_pictures()]
    with order_of_pillow_13():
        theirs = processor(images=pictures, return_tensors="pt")
    return f"{files.kind}: pixels within {_pixel_difference(prompt.name, prompt.inputs, theirs, 'pixel_values'):.1e}"


def _squares(stacks: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
    """The squares of all pictures in one row, without those that fill stacks up to one number."""
    return torch.cat([stack[: rows * columns + 1] for stack, (rows, columns) in zip(stacks, grids, strict=True)])


def _visual_inputs(inputs: Mapping[str, Any]) -> list[str]:
    return [name for name in ("pixel_values", "high_res_pixel_values", "image_grid_thw", "image_sizes") if name in inputs]


def _pixel_difference(prompt: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> float:
    mine, other = ours[name].float(), torch.as_tensor(theirs[name]).float()
    difference = float((mine - other).abs().max()) if mine.shape == other.shape else float("inf")
    if not difference <= PIXELS:
        shapes = f"{tuple(other.shape)} beside {tuple(mine.shape)}"
        raise ValueError(
            f"the export failed its check: {name} of {prompt!r} by transformers differ from those "
            f"of training by {difference:.2g} ({shapes})"
        )
    return difference
