"""Image-text contrast by a sigmoid for every pair of picture and text (SigLIP, Zhai et al. 2023,
section 3)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import data_parallel_group, global_mean, rank, world_size
from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.objectives.similarity import products, same_pair


class SigLIP(nn.Module):
    """Each pair is judged alone, so no row of all similarities is ever needed: texts go round the
    ranks, one block at a time.

    It stands where ITC does (`objective=siglip`) and is called as ITC is.

    Args:
        init_scale: start of the factor on cosine similarities.
        init_bias: start of the bias; strongly negative, because almost no pair matches.
        chunk: pictures that are judged at a time against the texts of one rank, so that at most
            `chunk` x texts similarities are held; each chunk is computed a second time for its
            gradient. None: all pictures of the rank.
    """

    compares = "pictures"  # with captions (see `lightning_internvl.model.compatibility`)

    def __init__(self, *, init_scale: float = 10.0, init_bias: float = -10.0, chunk: int | None = None) -> None:
        super().__init__()
        check_chunk("chunk", chunk)
        self.chunk = chunk
        # One dimension because sharding refuses scalars.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([init_bias]))

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities, shape (1,)."""
        return self.logit_scale.exp()

    def logits(self, image_BE: Tensor, text_CE: Tensor) -> Tensor:
        """Normalised rows to (B, C), whose sigmoid is the probability of a pair."""
        return products(self.scale.float() * image_BE, text_CE) + self.logit_bias

    def forward(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        ignored_B: Tensor | None = None,
        image_ids_B: Tensor | None = None,
        pair_ids_B: Tensor | None = None,
    ) -> Tensor:
        """The loss of all pairs over the number of pictures, for matching rows (B, E), which need
        not be normalised.

        The mean over ranks is the loss of the whole batch; its averaged gradients are exact for any
        number of processes.

        Args:
            ignored_B: True for rows that are not judged: pictures whose own caption is empty.
            image_ids_B: whole numbers that name the pictures; a picture matches every caption of an
                equal number.
            pair_ids_B: whole numbers that name the pairs; a pair is not compared with itself where
                it comes twice.
        """
        image, text = F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1)
        ids = torch.arange(len(image), device=image.device) + rank() * len(image) if image_ids_B is None else image_ids_B
        judged = torch.ones_like(ids, dtype=torch.bool) if ignored_B is None else ~ignored_B
        rows = (image, judged, torch.stack([ids, ids if pair_ids_B is None else pair_ids_B], dim=1))
        total, theirs = image.new_zeros((), dtype=torch.float32), rows[2]
        for step in range(world_size()):
            if step:
                text, theirs = passed_on(text), _exchanged(theirs, 1)
            total = total + self._block(rows, text, theirs)
        return global_mean(total, judged.sum())

    def _block(self, rows: tuple[Tensor, Tensor, Tensor], text_CE: Tensor, ids_C2: Tensor) -> Tensor:
        """The loss of all pairs of these pictures and texts.

        Args:
            rows: pictures (B, E), whether each is judged (B,), and ids.
            ids_C2: what matches where it is equal, and the pairs.
        """

        def judge(image: Tensor, judged: Tensor, ids_B2: Tensor) -> Tensor:
            matches = ids_B2[:, None, 0] == ids_C2[:, 0]
            losses = -F.logsigmoid(torch.where(matches, 1.0, -1.0) * self.logits(image, text_CE))
            compared = judged[:, None] & ~same_pair(ids_B2[:, 1], ids_C2[:, 1], matches)
            return (losses * compared).sum()

        pieces = number_of_chunks(len(rows[0]), self.chunk)
        return judge(*rows) if pieces == 1 else torch.stack(checkpointed_chunks(judge, pieces, *rows)).sum()


def passed_on(x_BE: Tensor) -> Tensor:
    """The rows of the rank before this one in the ring, with gradient."""
    return _Ring.apply(x_BE)


class _Ring(torch.autograd.Function):
    """One place forwards in the ring; the gradient goes one place back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _exchanged(x, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _exchanged(grad, -1)


def _exchanged(x: Tensor, step: int) -> Tensor:
    """What the rank `step` places before this one holds, while this one's goes `step` places on."""
    received, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    to, source = (rank() + step) % world_size(), (rank() - step) % world_size()
    send = dist.P2POp(dist.isend, x, group=data_parallel_group(), group_peer=to)
    works = dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, received, group=data_parallel_group(), group_peer=source)])
    for work in works:
        work.wait()
    return received
