"""An exported folder compared in an environment of the user's own that has transformers 4."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.distributed.scratch import scratch_folder
from lightning_internvl.export import check
from lightning_internvl.inference.collators import View
from lightning_internvl.messages import first_of

SCRIPT = Path(__file__).with_name("read_elsewhere.py")


def check_elsewhere(
    python: str,
    folder: Path,
    config: Config,
    view: View,
    prompts: Sequence[check.Prompt],
    reference: Sequence[check.Outputs],
    options: Mapping[str, Any],
) -> str:
    """Logits, greedy ids and tokens of a folder by the transformers of another Python, in a line.

    Raises:
        ValueError: if it does not run there, or gives others.
    """
    kind = "AutoModelForImageTextToText" if view.model.decoder is not None else config["architectures"][0]
    collator = view.chats or view.pairs
    with scratch_folder("elsewhere") as place:
        tensors: dict[str, Tensor] = {}
        for number, prompt in enumerate(prompts):
            given = check.model_inputs(prompt, view.model)
            tensors |= {f"{number}.{key}": value.contiguous() for key, value in given.items() if value.numel()}
        save_file(tensors, place / "inputs.safetensors")
        asked = {"options": dict(options), "written": check.NEW_TOKENS, "texts": check.QUESTIONS}
        (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        _run(python, str(folder.resolve()), kind, str(place))
        told = json.loads((place / "told.json").read_text(encoding="utf-8"))
        outputs = load_file(place / "outputs.safetensors")
    by = f"transformers {told['version']}"
    tied = getattr(view.model.decoder, "tied", False)
    if missing := [lost for lost in told["missing"] if not (tied and "lm_head" in lost)]:
        raise ValueError(f"the export failed its check: {by} finds no {first_of(missing, 20)}")
    found = []
    for number in range(len(prompts)):
        logits = outputs.get(f"{number}.logits")
        found.append(None if logits is None else (logits, outputs.get(f"{number}.ids")))
    try:
        differences, _ = check.check_outputs(prompts, reference, found)
    except ValueError as error:
        raise ValueError(f"{error} (by {by})") from error
    if collator and told["ids"] != [collator.tokenizer.encode(text, add_special_tokens=False) for text in check.QUESTIONS]:
        raise ValueError(f"the export failed its check: its tokenizer gives other ids by {by}")
    same = "the same greedy ids and tokens" if options else "the same tokens"
    return f"{by}: logits of {len(differences)} prompts within {max(differences.values()):.1e} of the largest, {same}"


def _run(python: str, *arguments: str) -> None:
    """Run the script there, with nothing of this environment and without the hub."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python, "-c", SCRIPT.read_text(encoding="utf-8"), *arguments]
    try:
        done = subprocess.run(command, env=environment, cwd=arguments[-1], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"transformers4={python} cannot be run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ValueError(f"the export failed its check: transformers4={python} does not read it: {last}")
