"""Losses and gradients are the same for 1, 2 and 4 processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lightning_internvl.objectives.itc import ITC
from lightning_internvl.objectives.itm import ITM
from lightning_internvl.objectives.next_token import NextToken
from lightning_internvl.objectives.siglip import SigLIP

WORLDS = (1, 2, 4)
WAIT = timedelta(seconds=30)  # a process that waits for a collective which another one never reaches fails
PAIRS, WIDTH = 8, 6
IGNORED = torch.tensor([False, True, True, True, False, False, True, False])
IMAGE_IDS = torch.tensor([2, 7, 2, 5, 7, 2, 1, 4])  # equal ones stand on different processes too
MATCHES = torch.tensor([0, -100, 1, 1, -100, -100, 0, 1])
NAMES = (
    "itc", "itc_ignored", "itc_same_pictures", "itc_global", "siglip", "siglip_ignored", "siglip_same_pictures", "itm",
    "next_token",
)  # fmt: skip


class Model(nn.Module):
    """Two small encoders and a token head, the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.itc, self.itm, self.next_token = ITC(label_smoothing=0.1), ITM(dim=WIDTH), NextToken()
        self.itc_global, self.siglip = ITC(label_smoothing=0.1, gather="global"), SigLIP()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    labels = torch.randint(0, WIDTH, (PAIRS, 5))
    labels[torch.rand(PAIRS, 5) < 0.5] = -100  # as many labels on each process as chance gives it
    labels[:4, 2:] = -100
    return torch.randn(PAIRS, WIDTH), torch.randn(PAIRS, WIDTH), labels


def losses(model: Model, rows: slice) -> dict[str, Tensor]:
    image, text, labels = (x[rows] for x in batch())
    states = model.text(text)[:, None].expand(-1, 5, -1)
    return {
        "itc": model.itc(model.image(image), model.text(text)),
        "itc_ignored": model.itc(model.image(image), model.text(text), IGNORED[rows]),
        "itc_same_pictures": model.itc(model.image(image), model.text(text), image_ids_B=IMAGE_IDS[rows]),
        "itc_global": model.itc_global(model.image(image), model.text(text), IGNORED[rows], IMAGE_IDS[rows]),
        "siglip": model.siglip(model.image(image), model.text(text)),
        "siglip_ignored": model.siglip(model.image(image), model.text(text), IGNORED[rows]),
        "siglip_same_pictures": model.siglip(model.image(image), model.text(text), image_ids_B=IMAGE_IDS[rows]),
        "itm": model.itm(model.image(image)[:, None] * model.text(text)[:, None], MATCHES[rows]),
        "next_token": model.next_token(states, labels, model.head),
    }


def work(rank: int, folder: str) -> None:
    """One process: its share of the batch, gradients averaged over processes as data-parallel training does."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        meeting = f"file://{folder}/meet-{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=WAIT)
        share = PAIRS // world
        found = {}
        for name in NAMES:
            model = Model()
            loss = losses(model, slice(rank * share, (rank + 1) * share))[name]
            loss.backward()
            gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
            found[name] = torch.cat([loss.detach().reshape(1), gradient])
            dist.all_reduce(found[name])
            found[name] /= world
        if rank == 0:
            torch.save(found, f"{folder}/result-{world}.pt")
        dist.barrier()
        dist.destroy_process_group()


def test_loss_and_gradient_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=max(WORLDS))
    results = {world: torch.load(tmp_path / f"result-{world}.pt") for world in WORLDS}
    model = Model()
    for name, loss in losses(model, slice(None)).items():
        torch.testing.assert_close(results[1][name][0], loss.detach())
        reference = results[1][name][1:]
        assert reference.norm() > 1e-2
        for world in WORLDS[1:]:
            loss_w, gradient = results[world][name][0], results[world][name][1:]
            torch.testing.assert_close(loss_w, loss.detach(), rtol=1e-5, atol=1e-6)
            assert torch.cosine_similarity(gradient.double(), reference.double(), dim=0) > 0.9999
            assert abs(gradient.norm() / reference.norm() - 1) < 1e-4
