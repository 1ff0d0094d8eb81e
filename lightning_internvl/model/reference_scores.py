"""Log-probabilities of answers under the weights that a stage starts from, kept on disk, so that no
second model is in memory.

A pair of answers is known by its tokens and by what the encoder sees of its pictures (see
`lightning_internvl.data.collate.pairs_of_answers`), the model by its weights and by how pictures are
normalised: other weights, another tokenizer or processor never find what was kept for the old ones.

Letters: P pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import full_tensor
from lightning_internvl.files import atomic_file
from lightning_internvl.layers.attention_masks import on_device
from lightning_internvl.layers.state_dict import own_tensors

Scores = dict[str, tuple[float, float]]  # of a pair's chosen and rejected answer, by its key


def name_of_reference(model: nn.Module, processor: Any, quantization: Mapping[str, Any]) -> str:
    """A name for the weights of all parts and for how pictures are prepared; where weights are divided
    all processes must ask."""
    about = {"mean": processor.mean, "std": processor.std, "quantization": quantization}
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(own_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(full_tensor(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_scores(path: Path) -> Scores:
    """The scores of a file; none where there is no file."""
    if not path.exists():
        return {}
    found = load_file(path)
    keys = (bytes(row).hex() for row in found["keys"].tolist())
    return dict(zip(keys, map(tuple, found["scores"].tolist()), strict=True))


def write_scores(path: Path, scores: Scores) -> None:
    """Write a file in one step: `keys` (P, 16) bytes, `scores` (P, 2) float32."""
    keys = torch.tensor([list(bytes.fromhex(key)) for key in scores], dtype=torch.uint8)
    with atomic_file(path) as draft:
        save_file({"keys": keys, "scores": torch.tensor([*scores.values()], dtype=torch.float32)}, draft)


def looked_up(scores: Scores, keys: Sequence[str], names: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """The scores of a batch's chosen and of its rejected answers, (P,) each.

    Args:
        names: of the samples, for messages.

    Raises:
        ValueError: naming a sample that has none.
    """
    if lacking := [name for key, name in zip(keys, names, strict=True) if key not in scores]:
        fault = f"sample {lacking[0]} has no score of the reference, because it is not what it was when the stage began"
        raise ValueError(f"{fault}; put the data and its settings back, or start the stage again")
    chosen, rejected = on_device(torch.tensor([scores[key] for key in keys]).T.contiguous(), device)
    return chosen, rejected
