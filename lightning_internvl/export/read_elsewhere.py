"""A folder as the transformers of another environment reads it. This text is run by the Python of
that environment, so it imports nothing of this project.

Arguments: the folder, the class that loads it, and a place with `inputs.safetensors` (names
"PROMPT.INPUT") and `asked.json`; `outputs.safetensors` and `told.json` are written there.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder: str, kind: str, place: str) -> None:
    """Logits, greedy ids and the ids of texts."""
    asked = json.loads(Path(place, "asked.json").read_text(encoding="utf-8"))
    loading: dict[str, Any] = {"torch_dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    model, info = getattr(transformers, kind).from_pretrained(folder, **loading)
    needs = inspect.signature(model.forward).parameters["pixel_values"].default is inspect.Parameter.empty
    prompts: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(Path(place, "inputs.safetensors")).items():
        number, _, field = name.partition(".")
        prompts.setdefault(number, {})[field] = tensor
    found = {}
    for number, inputs in prompts.items():
        if needs and "pixel_values" not in inputs:
            continue
        given = model.eval()(**inputs)
        found[f"{number}.logits"] = given.logits if asked["options"] else given.logits_per_image
        if asked["options"]:
            inputs.pop("labels", None)
            found[f"{number}.ids"] = model.generate(**inputs, **asked["options"])[:, -asked["written"] :]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(place, "outputs.safetensors"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    told: dict[str, Any] = {"version": transformers.__version__, "missing": [str(name) for name in info["missing_keys"]]}
    told["ids"] = [tokenizer.encode(text, add_special_tokens=False) for text in asked["texts"]]
    Path(place, "told.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
