"""What an exported folder says of itself so that others can check it: `proof/proof.json`, with the
hashes of its files and of its base's, and `proof/probe.safetensors`, inputs with the logits that
belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.choices import PARTS, Config
from lightning_internvl.export import check
from lightning_internvl.export.base_folder import base_folder, files_of, is_hub_id, licence_of
from lightning_internvl.files import read_json, sha256_of, write_json
from lightning_internvl.messages import first_of
from lightning_internvl.model.vlm import VLM

# In a folder of their own, because servers read every file of weights beside `config.json`.
PROOF, PROBE = "proof/proof.json", "proof/probe.safetensors"
FORMAT = 1
NOT_STATED = "not stated"


# --- written --------------------------------------------------------------------------------------


def bases_of(run: Mapping[str, Any]) -> list[Config]:
    """What a run took weights from: its name (of a folder the last part), licence, and the hashes of
    its files, none where it is not on this machine."""
    named = [run.get("init_from"), *((run.get(part) or {}).get("pretrained") for part in PARTS)]
    found = []
    for start in dict.fromkeys(str(name) for name in named if name):
        folder = base_folder(start)
        if folder is None and not is_hub_id(start):
            continue
        files = {} if folder is None else hashes(folder, files_of(folder))
        name = start if is_hub_id(start) else Path(start).resolve().name
        found.append({"name": name, "licence": licence_of(folder) or NOT_STATED, "files": files})
    return found


def hashes(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files by their path in a folder."""
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def without_secrets(place: str) -> str:
    """The name of a file or folder of data; of an address without what may open it: no user,
    password or query."""
    if "://" not in place:
        return Path(place).name
    parts = urlsplit(place)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def write_probe(folder: Path, model: VLM, prompts: Sequence[check.Prompt], options: Mapping[str, Any]) -> Config:
    """Write inputs of the first and the last prompt, with numbers drawn by a seed in the place of
    pixels, and the last logits and greedy ids that belong to them.

    Args:
        options: of `generate`.

    Returns:
        what is needed to compute them again
    """
    tensors: dict[str, Tensor] = {}
    asked = []
    for number, prompt in enumerate(prompts[:: max(1, len(prompts) - 1)][:2]):
        shapes = {name: list(t.shape) for name, t in prompt.inputs.items() if t.is_floating_point()}
        tensors |= {f"{number}.{name}": t.contiguous() for name, t in prompt.inputs.items() if name not in shapes}
        given = {name: tensor for name, tensor in prompt.inputs.items() if name not in shapes} | _drawn(shapes)
        logits, ids = check.model_outputs(model, check.Prompt(prompt.name, given, {}), options)
        tensors[f"{number}.logits"] = _last(logits)
        asked.append({"name": prompt.name, "drawn": shapes, "ids": None if ids is None else ids.tolist()})
    (folder / PROBE).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / PROBE)
    tokens = {"image_token_id": model.image_token_id, "image_placeholders": model.image_placeholders}
    return {"prompts": asked, "options": dict(options), **tokens}


def _drawn(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Numbers of these shapes that are the same everywhere."""
    rng = np.random.default_rng(0)
    return {name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for name, shape in sorted(shapes.items())}


def _last(logits: Tensor) -> Tensor:
    return (logits[:, -1] if logits.ndim == 3 else logits).detach().float().contiguous()


def write_proof(folder: Path, bases: Sequence[Config], probe: Config | None, known: Mapping[str, str]) -> None:
    """Write what is there, as the last file.

    Args:
        known: hashes of some of the files, which are not read again.
        probe: of `write_probe`; None of adapters, which compute nothing alone.
    """
    (folder / PROOF).parent.mkdir(exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    left = [path for path in files if path.relative_to(folder).as_posix() not in known]
    found = dict(sorted({**known, **hashes(folder, left)}.items()))
    write_json(folder / PROOF, {"format": FORMAT, "files": found, "bases": list(bases), "probe": probe})


# --- checked --------------------------------------------------------------------------------------


def verify(folder: Path, base: Path | None = None) -> list[str]:
    """Compute again what an exported folder says.

    Args:
        base: the folder of its base, where that is no hub id in the cache of Hugging Face.

    Returns:
        a line for each thing that is as it says

    Raises:
        ValueError: naming all that differs.
    """
    proof = read_json(folder / PROOF)
    if not isinstance(proof, dict) or proof.get("format") != FORMAT:
        raise ValueError(f"{folder} holds no {PROOF} of format {FORMAT}: only folders that export.py wrote can be checked")
    lines, faults = [], _file_faults(folder, proof["files"], "")
    if not faults:
        lines.append(f"{'files':12} {len(proof['files'])} have the hashes that were written")
    for entry in proof["bases"]:
        place = base if base is not None and len(proof["bases"]) == 1 else base_folder(entry["name"])
        said = f"{entry['name']} (licence: {entry['licence']})"
        if place is None or not entry["files"]:
            lines.append(f"{'base':12} {said} is not here, or was not when this was written: not checked; base=FOLDER names one")
        elif odd := _file_faults(place, entry["files"], f" of the base {entry['name']}"):
            faults += odd
        else:
            lines.append(f"{'base':12} {said}: {len(entry['files'])} files have the hashes that were written")
    if (probe := proof["probe"]) is not None:
        try:
            lines += _check_probe(folder, probe)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(f"{folder} is not what it says:\n" + "\n".join(f"  {fault}" for fault in faults))
    return lines


def _file_faults(folder: Path, files: Mapping[str, str], whose: str) -> list[str]:
    there = [name for name in files if (folder / name).is_file()]
    kinds = {
        f"missing{whose}": [name for name in files if name not in there],
        f"changed{whose}": [name for name in there if sha256_of(folder / name) != files[name]],
    }
    return [f"{kind}: {first_of(names, 20)}" for kind, names in kinds.items() if names]


def _check_probe(folder: Path, probe: Config) -> list[str]:
    """The logits and ids of the stored inputs by the weights that are there."""
    held = load_file(folder / PROBE)
    model = load_pretrained(folder, dtype=torch.float32).eval()
    model.image_token_id, model.image_placeholders = probe["image_token_id"], probe["image_placeholders"]
    worst = 0.0
    for number, asked in enumerate(probe["prompts"]):
        mine = {name.partition(".")[2]: tensor for name, tensor in held.items() if name.startswith(f"{number}.")}
        written = mine.pop("logits")
        given = check.Prompt(asked["name"], mine | _drawn(asked["drawn"]), {})
        logits, ids = check.model_outputs(model, given, probe["options"])
        worst = max(worst, check.close(f"the logits of the stored probe ({asked['name']})", written, _last(logits)))
        found = None if ids is None else ids.tolist()
        if found != asked["ids"]:
            raise ValueError(f"the greedy ids of the stored probe ({asked['name']}) are {found}, not {asked['ids']}")
    greedy = ", the same greedy ids" if probe["options"] else ""
    return [f"{'probe':12} logits of {len(probe['prompts'])} inputs within {worst:.1e} of the largest{greedy}"]
