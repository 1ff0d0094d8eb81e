"""Losses and gradients are the same for 1, 2 and 4 processes, however they are computed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_internvl.data.gradient_accumulation import window_shares
from lightning_internvl.launch import leave_processes
from lightning_internvl.layers.chunking import checkpointed_chunks
from lightning_internvl.objectives.itc import ITC
from lightning_internvl.objectives.itm import ITM
from lightning_internvl.objectives.next_token import NextToken, labelled_tokens
from lightning_internvl.objectives.siglip import SigLIP

WORLDS = (1, 2, 4)
WAIT = timedelta(seconds=30)  # a process that waits for a collective which another one never reaches fails
PAIRS, WIDTH = 8, 6
IGNORE_INDEX = torch.tensor([False, True, True, True, False, False, True, False])
IMAGE_IDS = torch.tensor([2, 7, 2, 5, 7, 2, 1, 4])  # equal ones stand on different processes too
MATCHES = torch.tensor([0, -100, 1, 1, -100, -100, 0, 1])
PLAIN = ("itc", "itc_ignored", "itc_same_pictures", "itc_global", "siglip", "siglip_ignored", "siglip_same_pictures", "itm",
         "next_token", "itc_pairs", "siglip_pairs")  # fmt: skip
# What must equal those: losses in chunks, of embeddings that are computed in chunks, and over several micro-batches.
OTHERS = (*(f"{name} in chunks" for name in PLAIN if name != "itm"), "itc of cached", "siglip of cached", "next_token of window")


class Model(nn.Module):
    """Two small encoders and a token head, the same in every process."""

    def __init__(self, chunk: int | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.itc, self.itm, self.next_token = ITC(label_smoothing=0.1, chunk=chunk), ITM(dim=WIDTH), NextToken(chunk=chunk)
        self.itc_global, self.siglip = ITC(label_smoothing=0.1, gather="global", chunk=chunk), SigLIP(chunk=chunk)

    def forward(self, name: str, rows: slice, cached: bool = False, windows: bool = False) -> Tensor:
        image, text, labels = (x[rows] for x in batch())
        ignored, same = IGNORE_INDEX[rows], IMAGE_IDS[rows]
        if windows:
            return self.window(text, labels)
        if cached:
            image, text = map(torch.cat, zip(*checkpointed_chunks(self.embed, 2, image, text), strict=True))
        else:
            image, text = self.embed(image, text)
        losses: dict[str, Callable[[], Tensor]] = {
            "itc": lambda: self.itc(image, text),
            "itc_ignored": lambda: self.itc(image, text, ignored),
            "itc_same_pictures": lambda: self.itc(image, text, image_ids_B=same),
            "itc_global": lambda: self.itc_global(image, text, ignored, same),
            "siglip": lambda: self.siglip(image, text),
            "siglip_ignored": lambda: self.siglip(image, text, ignored),
            "siglip_same_pictures": lambda: self.siglip(image, text, image_ids_B=same),
            "itc_pairs": lambda: self.itc(image, text, pair_ids_B=same),
            "siglip_pairs": lambda: self.siglip(image, text, pair_ids_B=same),
            "itm": lambda: self.itm(image[:, None] * text[:, None], MATCHES[rows]),
            "next_token": lambda: self.next_token(text[:, None].expand(-1, 5, -1), labels, self.head),
        }
        return losses[name]()

    def embed(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)

    def window(self, text: Tensor, labels: Tensor) -> Tensor:
        """The first row, then all others, as micro-batches of one step."""
        parts = [slice(0, 1), slice(1, None)]
        counts, total = [{"loss": labelled_tokens(labels[part])} for part in parts], torch.zeros(())
        for place, part in enumerate(parts):
            states = self.text(text[part])[:, None].expand(-1, 5, -1)
            shares, _ = window_shares(counts, place, len(parts), text.device)
            total = total + shares["loss"] * self.next_token(states, labels[part], self.head) / len(parts)
        return total


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    labels = torch.randint(0, WIDTH, (PAIRS, 5))
    labels[torch.rand(PAIRS, 5) < 0.5] = -100  # as many labels on each process as chance gives it
    labels[:4, 2:] = -100
    return torch.randn(PAIRS, WIDTH), torch.randn(PAIRS, WIDTH), labels


def found(name: str, world: int, rank: int) -> Tensor:
    """A loss and its gradient, averaged over processes as data-parallel training does."""
    name, way = (*name.split(" ", 1), "")[:2]
    share = PAIRS // world
    model = Model(max(1, share - 1) if way == "in chunks" else None)
    ready = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    loss = ready(name, slice(rank * share, (rank + 1) * share), way == "of cached", way == "of window")
    loss.backward()
    loss = loss.detach().reshape(1)
    if world > 1:
        dist.all_reduce(loss)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([loss / world, *(gradient.flatten() for gradient in gradients)])


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in (world for world in WORLDS if rank < world):
        meeting = f"file://{folder}/meet-{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=WAIT)
        results = {name: found(name, world, rank) for name in (*PLAIN, *OTHERS)}
        if rank == 0:
            torch.save(results, f"{folder}/result-{world}.pt")
        dist.barrier()
        leave_processes()


def test_loss_and_gradient_do_not_depend_on_processes_chunks_and_micro_batches(tmp_path: Path) -> None:
    together(work, str(tmp_path), count=max(WORLDS))
    results = {world: torch.load(tmp_path / f"result-{world}.pt") for world in WORLDS}
    for name in PLAIN:
        loss, reference = found(name, 1, 0).split([1, len(results[1][name]) - 1])
        assert reference.norm() > 1e-2
        for world in WORLDS:
            for way in (name, *(other for other in OTHERS if other.split()[0] == name)):
                loss_w, gradient = results[world][way].split([1, len(reference)])
                torch.testing.assert_close(loss_w, loss, rtol=1e-5, atol=1e-6)
                assert torch.cosine_similarity(gradient.double(), reference.double(), dim=0) > 0.9999, (world, way)
                assert abs(gradient.norm() / reference.norm() - 1) < 1e-4, (world, way)
