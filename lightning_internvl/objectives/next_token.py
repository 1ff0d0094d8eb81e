"""Next-token prediction over labelled tokens only: captions (ITG) and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.distributed.collectives import all_reduce_max, global_mean, world_size
from lightning_internvl.layers.attention_masks import Segments, on_device, starts
from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.layers.places import true_places
from lightning_internvl.messages import check_choice
from lightning_internvl.objectives.linear_cross_entropy import Judge, linear_cross_entropy, losses_and_gradient, plain_layer

LABELLED = "labelled"  # of the counts of a batch: tokens that are judged
# A token weighs n ** -power, where n labelled tokens are in its sample (InternVL 2.5, section 3.3) or answer
POWERS = {"token": 0.0, "square_root": 0.5, "sample": 1.0, "answer": 1.0}


class NextToken(nn.Module):
    """Cross-entropy of the next token, a mean over labelled tokens of all ranks.

    By tokens, a description of forty words weighs as much as forty answers of one. `average` says
    otherwise: a token of a sample with n labelled tokens weighs n ** -0.5 ("square_root", as
    InternVL 2.5 is trained) or 1 / n ("sample": all samples weigh the same). With "answer" n are
    those of an answer, and all answers weigh the same, several of one conversation too.

    Logits are computed where a label stands and nowhere else, and of many labels for a chunk at a
    time, so a large vocabulary costs the memory of one chunk. Behind a plain linear layer gradients
    are found in the forward pass, at no further cost; other heads (adapters, quantised or sharded
    weights, a layer before the last) compute each chunk a second time.

    Args:
        label_smoothing: share of the target spread over the vocabulary.
        chunk: labelled tokens that are judged at a time; None: all of them.
        average: "token", "square_root", "sample" or "answer".
    """

    def __init__(self, *, label_smoothing: float = 0.0, chunk: int | None = 1024, average: str = "token") -> None:
        super().__init__()
        check_choice("average", average, tuple(POWERS))
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"{label_smoothing=} must lie from 0 on and below 1")
        check_chunk("chunk", chunk)
        self.label_smoothing, self.chunk, self.power = label_smoothing, chunk, POWERS[average]
        self.lengths = answer_lengths if average == "answer" else sample_lengths  # what a token is weighed by
        self.judge: Judge = losses_and_gradient  # of a chunk's logits; compiled with the decoder's blocks

    def forward(
        self,
        hidden_BLH: Tensor,
        labels_BL: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        shifts: bool = True,
        count: int | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """The token at position t is judged by the state at t - 1.

        Args:
            labels_BL: ids, -100 where nothing is to be learnt.
            head: states (T, H) to logits (T, V).
            shifts: False where the state at t judges the token at t, as behind the decoder of an
                encoder-decoder.
            count: how many labels are judged, where the host knows it (see `labelled_tokens`); a
                GPU is then not asked for it.
            segments: lengths of the samples of each row, where rows are packed.
        """
        lengths_BL = self.lengths(labels_BL, shifts=shifts, segments=segments) if self.power else None
        if shifts:
            hidden_BLH, labels_BL = hidden_BLH[:, :-1], labels_BL[:, 1:]
        judged = _labelled(labels_BL, count)
        states, targets = judged(hidden_BLH), judged(labels_BL)
        if lengths_BL is None:
            return global_mean(self.total_loss(states, targets, head), (labels_BL != IGNORE_INDEX).sum())
        weights_T = judged(lengths_BL).clamp(min=1).float() ** -self.power
        return global_mean(self.total_loss(states, targets, head, weights_T), weights_T.sum())

    def weight(self, labels_BL: Tensor, *, shifts: bool = True, segments: Segments | None = None) -> float:
        """What the loss of this rank's batch is divided by: of all its labelled tokens the weights;
        of labels on the CPU."""
        lengths_BL = self.lengths(labels_BL, shifts=shifts, segments=segments)
        labelled = labels_BL[:, int(shifts) :] != IGNORE_INDEX
        return float((lengths_BL[labelled].float() ** -self.power).sum())

    def log_probabilities(
        self,
        hidden_BLH: Tensor,
        labels_BL: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        shifts: bool = True,
        count: int | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of each sample, row by row, the sum of the log-probabilities of its labelled tokens and
        their number, (S,) float32 each; the arguments are those of `forward`. Neither label
        smoothing nor `average` counts."""
        numbers_BL, samples = sample_numbers(labels_BL, segments)
        found_T, numbers_T = self.token_log_probabilities(
            hidden_BLH, labels_BL, head, shifts=shifts, count=count, beside=[numbers_BL]
        )
        empty_S = found_T.new_zeros(samples)
        return empty_S.index_add(0, numbers_T, found_T), empty_S.index_add(0, numbers_T, torch.ones_like(found_T))

    def token_log_probabilities(
        self,
        hidden_BLH: Tensor,
        labels_BL: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        shifts: bool = True,
        count: int | None = None,
        beside: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Of each labelled token, row by row, its log-probability, float32, and what stands in its
        place in the tensors (B, L) `beside`: (T,) each; the other arguments are those of `forward`."""
        if shifts:
            hidden_BLH, labels_BL, beside = hidden_BLH[:, :-1], labels_BL[:, 1:], [x[:, 1:] for x in beside]
        judged = _labelled(labels_BL, count)
        losses_T = self.token_losses(judged(hidden_BLH), judged(labels_BL), head)
        return -losses_T, *map(judged, beside)

    def token_losses(self, states_TH: Tensor, targets_T: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The cross-entropy of each token, (T,). Like `total_loss` it calls `head`, a chunk at a
        time."""

        def chunk_losses(states: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(head(states).float(), targets, reduction="none")

        pieces = self._pieces(states_TH, head)
        if pieces == 1 or states_TH.is_meta:
            return chunk_losses(states_TH, targets_T)
        return torch.cat(checkpointed_chunks(chunk_losses, pieces, states_TH, targets_T))

    def _pieces(self, states_TH: Tensor, head: Callable[[Tensor], Tensor]) -> int:
        """Chunks that the tokens are divided into."""
        pieces = number_of_chunks(len(states_TH), self.chunk)
        if self.chunk is not None and plain_layer(head) is None and _is_sharded(head):
            # a sharded head is called equally often on all ranks, or they wait forever
            pieces = all_reduce_max(pieces)
        return pieces

    def total_loss(
        self, states_TH: Tensor, targets_T: Tensor, head: Callable[[Tensor], Tensor], weights_T: Tensor | None = None
    ) -> Tensor:
        """The sum over tokens by their weights, a scalar. Here and in `token_losses` alone `head` is
        called; `lightning_internvl.plan.flops` overrides both."""
        pieces, layer = self._pieces(states_TH, head), plain_layer(head)
        # what is planned needs no memory, and its parts are told apart by their calls
        if pieces == 1 or states_TH.is_meta:
            return self._chunk_loss(states_TH, targets_T, weights_T, head)
        if layer is not None:
            smoothing, judge = self.label_smoothing, self.judge
            return linear_cross_entropy(
                states_TH, layer, targets_T, weights_T, pieces=pieces, label_smoothing=smoothing, judge=judge
            )

        def chunk_loss(states: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
            return self._chunk_loss(states, targets, weights, head)

        given = (states_TH, targets_T) if weights_T is None else (states_TH, targets_T, weights_T)
        return torch.stack(checkpointed_chunks(chunk_loss, pieces, *given)).sum()

    def _chunk_loss(
        self, states_TH: Tensor, targets_T: Tensor, weights_T: Tensor | None, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        logits_TV, smoothing = head(states_TH).float(), self.label_smoothing
        if weights_T is None:
            return F.cross_entropy(logits_TV, targets_T, reduction="sum", label_smoothing=smoothing)
        return weights_T @ F.cross_entropy(logits_TV, targets_T, reduction="none", label_smoothing=smoothing)


def _labelled(labels_BL: Tensor, count: int | None) -> Callable[[Tensor], Tensor]:
    """Takes of a tensor (B, L, ...) the places with labels; where no values are held all, the most
    that it can be."""
    places = None if labels_BL.is_meta else true_places(labels_BL != IGNORE_INDEX, count)
    return lambda x: x.flatten(0, 1) if places is None else x[places]


def sample_numbers(labels_BL: Tensor, segments: Segments | None = None) -> tuple[Tensor, int]:
    """The number of the sample of each token, counted through all rows, and how many there are; what
    lies behind the samples of a packed row belongs to its last one."""
    rows, length = labels_BL.shape
    if segments is None:
        return torch.arange(rows, device=labels_BL.device)[:, None].expand(rows, length), rows
    firsts_BL = torch.zeros(rows, length, dtype=torch.long, device="cpu")
    for row, lengths in enumerate(segments):
        firsts_BL[row, [0, *accumulate(lengths[:-1])]] = 1
    numbers_BL = firsts_BL.flatten().cumsum(0).view(rows, length) - 1
    return on_device(numbers_BL, labels_BL.device), sum(map(len, segments))


def sample_lengths(labels_BL: Tensor, *, shifts: bool = True, segments: Segments | None = None) -> Tensor:
    """How many labelled tokens the sample of each token has, at the places that are judged: (B, L -
    1), or (B, L) where nothing shifts. A row is one sample, or is packed."""
    first = int(shifts)
    labelled_BL = (labels_BL[:, first:] != IGNORE_INDEX).long()
    if segments is None:
        return labelled_BL.sum(dim=1, keepdim=True).expand_as(labelled_BL)
    begin_BL = on_device(starts(segments, labels_BL.shape[1])[:, first:], labels_BL.device)
    return torch.zeros_like(labels_BL).scatter_add_(1, begin_BL, labelled_BL).gather(1, begin_BL)


def answer_lengths(labels_BL: Tensor, *, shifts: bool = True, segments: Segments | None = None) -> Tensor:
    """As `sample_lengths`, for the answer of each token, the labelled tokens that stand together; a
    sample begins another one."""
    first = int(shifts)
    labelled_BL = labels_BL[:, first:] != IGNORE_INDEX
    begins_BL = labelled_BL & ~F.pad(labelled_BL[:, :-1], (1, 0))
    if segments is not None:
        begin_BL = on_device(starts(segments, labels_BL.shape[1])[:, first:], labels_BL.device)
        begins_BL |= labelled_BL & F.pad(begin_BL[:, 1:] != begin_BL[:, :-1], (1, 0))
    answers_BL = begins_BL.long().cumsum(dim=1)  # 0 before the first one
    return torch.zeros_like(F.pad(answers_BL, (0, 1))).scatter_add_(1, answers_BL, labelled_BL.long()).gather(1, answers_BL)


def weighs_samples(objective: nn.Module) -> TypeGuard[NextToken]:
    """Whether an objective, which may be one of the user's own, has to know where samples end."""
    return isinstance(objective, NextToken) and objective.power > 0


def counts_of(
    objective: nn.Module, name: str, labels_BL: Tensor, *, shifts: bool = True, segments: Segments | None = None
) -> dict[str, float]:
    """What a stage's `counts` says of the loss of this name: what it is divided by, and `LABELLED`; of
    labels on the CPU."""
    labelled = labelled_tokens(labels_BL, shifts=shifts)
    weight = objective.weight(labels_BL, shifts=shifts, segments=segments) if weighs_samples(objective) else labelled
    return {name: weight, LABELLED: labelled}


def labelled_tokens(labels_BL: Tensor, *, shifts: bool = True) -> int:
    """How many tokens of this rank's batch are judged; of labels on the CPU."""
    return int((labels_BL[:, int(shifts) :] != IGNORE_INDEX).sum())


def _is_sharded(head: Callable[[Tensor], Tensor]) -> bool:
    """Whether calling a head gathers weights from all ranks (FSDP2)."""
    owner = head if isinstance(head, nn.Module) else getattr(head, "__self__", None)
    parameters = owner.parameters() if world_size() > 1 and isinstance(owner, nn.Module) else ()
    return any(hasattr(parameter, "device_mesh") for parameter in parameters)
