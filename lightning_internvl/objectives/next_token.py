"""Next-token prediction over labelled tokens only: captions (ITG) and answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.distributed.collectives import all_reduce_max, global_mean, world_size
from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.layers.places import true_places
from lightning_internvl.objectives.linear_cross_entropy import Judge, linear_cross_entropy, losses_and_gradient, plain_layer


class NextToken(nn.Module):
    """Cross-entropy of the next token, a mean over labelled tokens of all ranks.

    Logits are computed where a label stands and nowhere else, and of many labels for a chunk at a
    time, so a large vocabulary costs the memory of one chunk. Behind a plain linear layer gradients
    are found in the forward pass, at no further cost; other heads (adapters, quantised or sharded
    weights, a layer before the last) compute each chunk a second time.

    Args:
        label_smoothing: share of the target spread over the vocabulary.
        chunk: labelled tokens that are judged at a time; None: all of them.
    """

    def __init__(self, *, label_smoothing: float = 0.0, chunk: int | None = 1024) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"{label_smoothing=} must lie from 0 on and below 1")
        check_chunk("chunk", chunk)
        self.label_smoothing, self.chunk = label_smoothing, chunk
        self.judge: Judge = losses_and_gradient  # of a chunk's logits; compiled with the decoder's blocks

    def forward(
        self,
        hidden_BLH: Tensor,
        labels_BL: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        shifts: bool = True,
        count: int | None = None,
    ) -> Tensor:
        """The token at position t is judged by the state at t - 1.

        Args:
            labels_BL: ids, -100 where nothing is to be learnt.
            head: states (T, H) to logits (T, V).
            shifts: False where the state at t judges the token at t, as behind the decoder of an
                encoder-decoder.
            count: how many labels are judged, where the host knows it (see `labelled_tokens`); a
                GPU is then not asked for it.
        """
        if shifts:
            hidden_BLH, labels_BL = hidden_BLH[:, :-1], labels_BL[:, 1:]
        labelled = labels_BL != IGNORE_INDEX
        # where no values are held, all tokens are taken, the most that it can be
        if labels_BL.is_meta:
            states, targets = hidden_BLH.flatten(0, -2), labels_BL.flatten()
        else:
            places = true_places(labelled, count)
            states, targets = hidden_BLH[places], labels_BL[places]
        return global_mean(self.total_loss(states, targets, head), labelled.sum())

    def total_loss(self, states_TH: Tensor, targets_T: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over tokens, a scalar. The only place where `head` is called;
        `lightning_internvl.plan.flops` overrides it."""
        pieces, layer = number_of_chunks(len(states_TH), self.chunk), plain_layer(head)
        if layer is None and self.chunk is not None and _is_sharded(head):
            # a sharded head is called equally often on all ranks, or they wait forever
            pieces = all_reduce_max(pieces)
        # what is planned needs no memory, and its parts are told apart by their calls
        if pieces == 1 or states_TH.is_meta:
            return self._chunk_loss(states_TH, targets_T, head)
        if layer is not None:
            smoothing, judge = self.label_smoothing, self.judge
            return linear_cross_entropy(states_TH, layer, targets_T, pieces=pieces, label_smoothing=smoothing, judge=judge)

        def chunk_loss(states: Tensor, targets: Tensor) -> Tensor:
            return self._chunk_loss(states, targets, head)

        return torch.stack(checkpointed_chunks(chunk_loss, pieces, states_TH, targets_T)).sum()

    def _chunk_loss(self, states_TH: Tensor, targets_T: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        logits_TV = head(states_TH).float()
        return F.cross_entropy(logits_TV, targets_T, reduction="sum", label_smoothing=self.label_smoothing)


def labelled_tokens(labels_BL: Tensor, *, shifts: bool = True) -> int:
    """How many tokens of this rank's batch are judged; of labels on the CPU."""
    return int((labels_BL[:, int(shifts) :] != IGNORE_INDEX).sum())


def _is_sharded(head: Callable[[Tensor], Tensor]) -> bool:
    """Whether calling a head gathers weights from all ranks (FSDP2)."""
    owner = head if isinstance(head, nn.Module) else getattr(head, "__self__", None)
    parameters = owner.parameters() if world_size() > 1 and isinstance(owner, nn.Module) else ()
    return any(hasattr(parameter, "device_mesh") for parameter in parameters)
