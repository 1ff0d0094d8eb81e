"""What people hold in place of a whole model's weights, each named for what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ADAPTERS = "adapter_config.json"  # of PEFT
LLAVA_WHOLE = "non_lora_trainables.bin"  # what LLaVA has trained whole beside adapters
# kinds of PEFT's adapters that learn inputs, not weights
PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/"
# what tools leave beside a file that they are still writing
UNFINISHED = ("*.incomplete", ".cache/huggingface/download/**/*.incomplete", "*.part", "*.crdownload", "*.aria2")
AGAIN = "get the rest (hf download ID --local-dir FOLDER goes on where it stopped)"
# types of safetensors that are computed with here
FLOATS = {"F64", "F32", "F16", "BF16"}


def check_pointer(file: Path) -> None:
    """Refuse a file that Git LFS has left in place of the real one.

    Raises:
        ValueError: with what to do.
    """
    with file.open("rb") as stream:
        if stream.read(len(LFS)) == LFS:
            raise ValueError(f"{file} is a pointer of Git LFS, not the file itself; run  git lfs pull  in its folder")


def damaged(file: Path, error: Exception) -> ValueError:
    """What to say of a file of weights that cannot be read, most often one whose download broke off."""
    reason = str(error).partition(". ")[0].strip().removeprefix("Error while deserializing header: ")
    size = f"{file.stat().st_size:,} bytes"
    advice = f"delete it and fetch it again (hf download ID {file.name} --local-dir FOLDER)"
    return ValueError(f"{file} ({size}) is damaged or cut off: {reason}; {advice}")


def what_instead(folder: Path) -> str | None:
    """What a folder without a model's weights holds, and what to do; None for nothing known."""
    if (settings := folder / ADAPTERS).is_file():
        base = _base(settings)
        return f"adapters for {base}, no whole model; {adapter_advice('LORA')}"
    if any(found for pattern in UNFINISHED for found in folder.glob(pattern)):
        return f"a download that has not finished; {AGAIN}"
    if parts := sorted(folder.glob("*-of-*.safetensors")) or sorted(folder.glob("*-of-*.bin")):
        return f"{len(parts)} numbered files ({parts[0].name}, ...) without the index that belongs to them; {AGAIN}"
    return None


def adapter_advice(kind: str) -> str:
    """What to do with adapters of a `peft_type` that are not put together here."""
    if kind in PROMPTS:
        return "what they learnt stands before the text and cannot become weights: use them with PEFT, or train LoRA adapters"
    steps = "PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(MERGED)"
    return f"merge them into their base first ({steps} of PEFT) and give MERGED"


def _base(settings: Path) -> str:
    try:
        return str(json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        return "a base that they do not name"


def type_name(dtype: torch.dtype) -> str:
    """A type as safetensors writes it, where it is a floating-point one that is computed with."""
    known = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return known.get(dtype, str(dtype).removeprefix("torch."))


def quantiser(config: dict[str, Any]) -> str | None:
    """The method by which a `config.json` says that its weights are quantised."""
    settings = config.get("quantization_config")
    return str(settings.get("quant_method") or "an unknown method") if isinstance(settings, dict) else None
