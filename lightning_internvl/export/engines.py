"""An exported folder computed by llama.cpp or vLLM, where a package of it is installed, beside the
model that was exported. Letters: V vocabulary."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.export import check
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.files import DRAFT
from lightning_internvl.inference.collators import View

SCRIPT = Path(__file__).with_name("engine_rows.py")
# What runs a reader, the first that is there; and how far its log-probabilities may be from ours.
PACKAGES = {"llama_cpp": ("xllamacpp", "llama_cpp"), "vllm": ("vllm",)}
LIMITS = {"llama_cpp": 0.01, "vllm": 0.02}  # ggml takes gelu from a table; kernels of vLLM differ by device
COUNT = 10  # most probable tokens that are compared at each place


def run_engine(reader: str, folder: Path, view: View) -> str:
    """What an engine gives for the texts of the check, in words that follow those of its rules.

    Args:
        folder: an export; for llama.cpp GGUF files in float32 are made of it, and removed.
        view: with the model whose weights were written.

    Raises:
        ValueError: if the engine does not read the folder, or gives other log-probabilities.
    """
    name = next((name for name in PACKAGES[reader] if importlib.util.find_spec(name)), None)
    if name is None:
        return f"it was not run: {' or '.join(PACKAGES[reader])} is not installed"
    if view.chats is None:
        return "it was not run: this model writes nothing"
    if reader == "llama_cpp" and importlib.util.find_spec("gguf") is None:
        return "it was not run: its files need  pip install -r requirements-gguf.txt"
    rows, wanted = next_tokens(view)
    letter = view.chats.tokenizer.encode("a", add_special_tokens=False)[-1]
    asked = {"rows": rows, "count": COUNT, "letter": letter}
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=DRAFT, dir=folder.parent) as place:
        model = folder if reader == "vllm" else _gguf(folder, Path(place))
        told = _run(reader, name, Path(place), asked | {"model": str(model)})
    found = [{int(token): value for token, value in row.items()} for row in told["rows"]]
    largest = max(difference(ours, theirs) for ours, theirs in zip(wanted, found, strict=True))
    same = sum(int(ours.argmax()) == max(row, key=row.__getitem__) for ours, row in zip(wanted, found, strict=True))
    said = f"{told['by']} gives log-probabilities of {len(rows)} next tokens of texts within {largest:.1e}"
    if not largest <= LIMITS[reader]:  # NaN is above every limit
        raise ValueError(f"the export failed its check: {reader}: {said}, more than {LIMITS[reader]}")
    return f"{said}, {same} greedy ids of {len(rows)} equal"


@torch.no_grad()
def next_tokens(view: View) -> tuple[list[list[int]], list[Tensor]]:
    """Prompts without a picture, each alone and with 1 to 7 of the tokens that the model writes after
    it, and what it gives for the next one: log-probabilities (V,)."""
    model, greedy = view.model, check.greedy_options(view)
    rows: list[list[int]] = []
    wanted: list[Tensor] = []
    for prompt in check.text_prompts(view):
        _, written = check.model_outputs(model, prompt, greedy)
        assert written is not None  # chats are written
        ids = torch.cat([prompt.inputs["input_ids"], written[:, :-1].to(prompt.inputs["input_ids"])], dim=1)
        whole = prompt.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logs = model(**whole).logits[0].float().log_softmax(-1)
        begun = prompt.inputs["input_ids"].shape[1]
        for length in range(begun, ids.shape[1] + 1):
            rows.append(ids[0, :length].tolist())
            wanted.append(logs[length - 1])
    return rows, wanted


def difference(ours: Tensor, theirs: Mapping[int, float]) -> float:
    """The largest difference of log-probabilities (V,) from those of some tokens, and between those
    of each side's most probable one."""
    values = torch.tensor(list(theirs.values()))
    beside = ours[torch.tensor(list(theirs))] - values
    return float(torch.cat([beside, (ours.max() - values.max())[None]]).abs().max())


def _gguf(folder: Path, place: Path) -> Path:
    from lightning_internvl.export.gguf_files import write_gguf

    write_gguf(folder, place / "model.gguf", ExportOptions(dtype="float32"))
    return place / "model.gguf"


def _run(reader: str, name: str, place: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Run the script; its answer."""
    (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    arguments: Sequence[str] = [name, str(place / "asked.json"), str(place / "told.json")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        why = next((line.partition(" E ")[2] for line in lines if " E " in line), lines[-1])  # llama.cpp's first error
        raise ValueError(f"the export failed its check: {reader} ({name}) does not read it: {why}")
    return json.loads((place / "told.json").read_text(encoding="utf-8"))
