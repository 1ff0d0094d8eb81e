"""One process of the runner for contrastive losses; a module of its own, so that processes start without the other runners."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_internvl.objectives import ITC, SigLIP

WAIT = timedelta(seconds=60)
GATHERS = {"clip_local_grad": "exact", "clip_global_grad": "global", "clip_global_nograd": "detached"}


def work(rank: int, fixture: str, folder: str, worlds: list[int], names: list[str]) -> None:
    """One process: every loss in every world that it belongs to."""
    torch.set_num_threads(1)
    for world in (w for w in worlds if rank < w):
        meeting = f"file://{folder}/meet-{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=WAIT)
        found = {f"world{world}.{name}.{key}": t for name in names for key, t in _loss(Path(fixture), name, rank, world).items()}
        torch.save(found, f"{folder}/{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def _loss(fixture: Path, name: str, rank: int, world: int) -> dict[str, Tensor]:
    objective: nn.Module = SigLIP() if name.startswith("siglip_") else ITC(gather=GATHERS[name])
    weights, inputs = load_file(fixture / "model.safetensors"), load_file(fixture / "inputs.safetensors")
    objective.load_state_dict({key: weights[key] for key in objective.state_dict()})
    objective.eval()
    image, text = (inputs[f"{side}_raw"].chunk(world)[rank].requires_grad_() for side in ("image", "text"))
    loss = objective(image, text)
    loss.backward()
    gradients = {f"grad_{key}": parameter.grad for key, parameter in objective.named_parameters()}
    return {"loss": loss.detach().reshape(1), "grad_image": image.grad, "grad_text": text.grad, **gradients}
