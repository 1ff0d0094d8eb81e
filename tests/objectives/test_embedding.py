"""Contrast of a decoder's embeddings: the losses of sentence-transformers, late interaction by hand, contents that come twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.objectives import EmbeddingContrast, similarities

B, E = 4, 6


def vectors() -> list[Tensor]:
    """Queries, their documents, and two wrong documents of each."""
    return [torch.cos(torch.arange(24.0) * (step + 0.37)).view(B, E).requires_grad_() for step in range(4)]


def losses(settings: dict[str, Any], wrong: int) -> tuple[float, list[float]]:
    """The loss, and the norm of the gradient by what it is of."""
    query, *documents = vectors()[: 2 + wrong]
    objective = EmbeddingContrast(decoder_dim=E, **settings)
    behind = [torch.stack(documents[1:], dim=1).flatten(0, 1)] if wrong else []  # those of a query side by side
    found = objective(query, torch.cat([documents[0], *behind]))
    loss = sum(objective.weights[name] * value for name, value in found.items())
    return loss.item(), [x.norm().item() for x in torch.autograd.grad(loss, [query, *documents])]


# sentence-transformers 6.2.0: MultipleNegativesRankingLoss(scale=20), with directions=("query_to_doc", "doc_to_query") and
# partition_mode="per_direction", and in MatryoshkaLoss(matryoshka_dims=[6, 4, 2])
ONE_WAY = {"symmetric": False}
OFFICIAL = [
    (ONE_WAY, 0, 3.4393205642700195, [8.052082061767578, 6.814209461212158]),
    (ONE_WAY, 2, 5.106541156768799, [6.480456829071045, 5.618330955505371, 3.3732786178588867, 3.66045880317688]),
    ({}, 0, 3.4212889671325684, [7.66194486618042, 6.649202346801758]),
    ({}, 2, 4.254899024963379, [6.494320392608643, 5.8678202629089355, 1.6866393089294434, 1.83022940158844]),
    (ONE_WAY | {"widths": [4, 2]}, 1, 8.211687088012695, [12.5757474899292, 12.721139907836914, 6.261577129364014]),
    (
        ONE_WAY | {"widths": [4, 2], "width_weights": [0.5, 0.25]},
        1,
        6.1454758644104,
        [9.343854904174805, 8.621910095214844, 5.122360706329346],
    ),
]


@pytest.mark.parametrize(("settings", "wrong", "loss", "norms"), OFFICIAL)
@pytest.mark.parametrize("chunk", [None, 3])
def test_losses_and_gradients_are_those_of_sentence_transformers(
    settings: dict[str, Any], wrong: int, loss: float, norms: list[float], chunk: int | None
) -> None:
    found, gradients = losses({**settings, "chunk": chunk}, wrong)
    assert found == pytest.approx(loss, rel=1e-6)
    assert gradients == pytest.approx(norms, rel=1e-6)


def test_late_interaction_is_the_mean_best_cosine_over_the_tokens_of_a_query() -> None:
    torch.manual_seed(0)
    lengths = {"query": [2, 3], "document": [4, 1, 3]}
    rows = {name: [F.normalize(torch.randn(n, E), dim=-1) for n in own] for name, own in lengths.items()}
    wanted = torch.tensor([[(q @ d.T).amax(dim=1).mean().item() for d in rows["document"]] for q in rows["query"]])
    padded = {name: torch.nn.utils.rnn.pad_sequence(own, batch_first=True) for name, own in rows.items()}
    torch.testing.assert_close(similarities(padded["document"], padded["query"]), wanted.T)
    objective = EmbeddingContrast(decoder_dim=E, pooling="late", symmetric=False, init_scale=3.0)
    found = objective(padded["query"], padded["document"])["embedding"]
    torch.testing.assert_close(found, F.cross_entropy(3.0 * wanted, torch.tensor([0, 1])))


def test_states_are_pooled_without_padding() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    last, mean, late = (
        EmbeddingContrast(decoder_dim=2, pooling=kind, width=w) for kind, w in (("last", None), ("mean", None), ("late", 3))
    )
    assert last.embed(hidden, mask).tolist() == [[4.0, 5.0], [8.0, 9.0]]
    assert mean.embed(hidden, mask).tolist() == [[2.0, 3.0], [7.0, 8.0]]
    vectors_of_tokens = late.embed(hidden, mask)
    assert vectors_of_tokens.shape == (2, 3, 3)
    torch.testing.assert_close(vectors_of_tokens[0], late.project(hidden[0]))
    assert not vectors_of_tokens[1, 2].any()
    assert vectors_of_tokens[1, 1].any()


def test_what_is_as_right_as_its_own_is_not_compared() -> None:
    query, positive, wrong, _ = vectors()
    objective = EmbeddingContrast(decoder_dim=E, symmetric=False)
    scores = 20 * F.normalize(query, dim=-1) @ F.normalize(torch.cat([positive, wrong]), dim=-1).T

    def loss(queries: list[int], documents: list[int]) -> Tensor:
        return objective(query, torch.cat([positive, wrong]), torch.tensor(queries), torch.tensor(documents))["embedding"]

    def wanted(*left_out: tuple[int, int]) -> Tensor:
        mask = torch.zeros(B, 2 * B, dtype=torch.bool)
        for place in left_out:
            mask[place] = True
        return F.cross_entropy(scores.masked_fill(mask, -torch.inf), torch.arange(B))

    torch.testing.assert_close(loss([0, 1, 2, 3], [*range(10, 18)]), wanted())
    torch.testing.assert_close(loss([0, 1, 0, 3], [*range(10, 18)]), wanted((0, 2), (2, 0)))  # an equal query
    torch.testing.assert_close(loss([0, 1, 2, 3], [10, 11, 11, 13, 14, 15, 16, 17]), wanted((1, 2), (2, 1)))  # an equal document
    torch.testing.assert_close(loss([0, 1, 2, 3], [10, 11, 12, 13, 14, 10, 16, 13]), wanted((0, 5), (3, 7)))  # as wrong ones


def test_a_scale_that_is_fixed_is_no_parameter_and_one_that_is_learnt_is_held() -> None:
    fixed, learnt = EmbeddingContrast(decoder_dim=E, learn_scale=False), EmbeddingContrast(decoder_dim=E, init_scale=300.0)
    assert not fixed.state_dict()
    assert [name for name, _ in learnt.named_parameters()] == ["logit_scale"]
    learnt(*vectors()[:2])
    assert learnt.logit_scale.exp().item() == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"pooling": "max"}, "pooling='max' is not known; valid choices: last, mean, late"),
        ({"widths": [3, 7]}, r"widths=\[3, 7\]: 7 must be a whole number above 0 and below 6, which is the decoder's own width"),
        ({"width": 4, "widths": [4]}, "below 4, which is the embedding's own width"),
        ({"widths": [2, 2]}, "names one twice"),
        ({"widths": [2], "width_weights": [1.0, 2.0]}, "must be one for each of widths"),
        ({"width": 0}, "width=0 must be a whole number above 0"),
        ({"init_scale": 0}, "init_scale=0 must be a number above 0"),
        ({"chunk": 0}, "chunk=0 must be a whole number above 0"),
    ],
)
def test_sizes_that_an_embedding_does_not_have_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        EmbeddingContrast(decoder_dim=E, **settings)
