"""Another language model behind a finished tower and connector: the last layer of the connector is
solved in closed form, so that visual tokens stand among the words of the new language model where
they stood among those of the old one.

A visual token is described by how near it is to words that both language models have (`WordSpace`);
what the new one is to read there is the mean of its own embeddings of them, by nearness. That is how
embeddings are handed to another tokenizer (Minixhofer et al. 2022, section 3; Dobler and de Melo
2023, section 3), here those of visual tokens. Layers before the last keep their weights.

Letters: N places, V shared words, H width of the old language model, G of the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.config.targets import build
from lightning_internvl.data.tokenizer import shared_words
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.layers.word_space import in_words_of
from lightning_internvl.messages import check_number
from lightning_internvl.model.compose import completed_middleware, compose_model, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.freezing import matches
from lightning_internvl.stages.roles import model_roles, names_of
from lightning_internvl.stages.solved_connector import SolvedConnector, chain_of, connector_reads, through

FEWEST = 100  # shared words that describe visual tokens


class DecoderTransplantStage(SolvedConnector):
    """Solves the last layer of the connector of a model whose language model is another one now.

    Args:
        old: what is replaced, as `init_from` has it: `decoder`, and the `middleware` that it reads
            through (configurations). Filled in.
        weights_of: a run, a hand-off, an official checkpoint or a hub id with the weights of the new
            language model; None for one that brings its own. Filled in.
        temperature: of the nearness to words, see `layers.word_space`.
        settings: of `SolvedConnector`.

    Raises:
        ValueError: for tokenizers that have hardly a word in common.
    """

    def __init__(
        self,
        model: VLM,
        *,
        old: Mapping[str, Any] | None = None,
        weights_of: str | None = None,
        temperature: float = 0.05,
        **settings: Any,
    ) -> None:
        super().__init__(model, layers=slice(-1, None), **settings)
        assert old is not None  # `training.transplant` has filled it in
        check_number(f"stages.{self.name}.module.temperature", temperature, above=0)
        self.weights_of, self.temperature = weights_of, temperature
        with torch.device("meta"):
            before, tokenizers = compose_model(old, trusted_build)
        self.table = _word_table(before)
        teacher = completed_middleware(trusted_build, old["middleware"], model.encoder, decoder_dim=before.decoder.dim)
        self.teacher = (teacher.requires_grad_(False).eval(),)
        words = shared_words(tokenizers["decoder"], build(self.parts["decoder"]["tokenizer"]))
        if len(words) < FEWEST:
            fault = f"the tokenizers of init_from and of the new language model share {len(words)} words, which say too little"
            raise ValueError(f"stages.{self.name}: {fault}; {FEWEST} or more are needed")
        self.old_ids, self.new_ids = torch.tensor(words).unbind(dim=1)
        self.words_VH = torch.zeros(len(words), before.decoder.dim)  # of the old language model

    def start_tensors(
        self, tensors: Mapping[str, Tensor], read: Callable[[str], Mapping[str, Tensor]]
    ) -> tuple[Mapping[str, Tensor], set[str]]:
        """The old connector takes its weights; the model gets the tower, the new language model, and
        of the connector what stands before its last linear layer."""
        teacher, use = self.teacher[0], "the old language model reads through"
        self.words_VH = self.of_start(tensors, self.table, use)[self.old_ids].float()
        for name, own in own_tensors(teacher).items():
            own.copy_(self.of_start(tensors, f"middleware.{name}", use))
        brought = read(self.weights_of) if self.weights_of else own_tensors(self.model)
        decoder = {name: x for name, x in brought.items() if name.startswith("decoder.")}
        connector = self._carried(teacher, decoder[_word_table(self.model)])
        kept = {name: x for name, x in tensors.items() if name.startswith("encoder.")}
        return kept | connector | decoder, set(decoder)

    def _carried(self, teacher: nn.Module, table: Tensor) -> dict[str, Tensor]:
        """What of the old connector goes on: the units of layers before the last, and among the new
        words what stands beside them for itself (the end of a row of squares)."""
        own, theirs = self.model.middleware, own_tensors(teacher)
        carry_units(chain_of(teacher), chain_of(own))
        solved, found = {id(parameter) for parameter in self._linear(0).parameters()}, {}
        for name, parameter in own.named_parameters():
            if id(parameter) in solved:
                continue
            found[f"middleware.{name}"] = tensor = parameter.detach()
            if not name.startswith(f"{own.projection}."):
                tensor.copy_(self._among_words(theirs[name].view(1, -1), table[self.new_ids]).view_as(tensor))
        return found

    def _among_words(self, x_NH: Tensor, words_VG: Tensor) -> Tensor:
        return in_words_of(x_NH.float(), self.words_VH, words_VG.float(), self.temperature)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.words_VH, self.new_ids = self.words_VH.to(self.device), self.new_ids.to(self.device)

    def wanted(self, pixels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the last layer reads of pictures, and where the old visual tokens stand among the new words."""
        given = connector_reads(self.model, pixels, inputs)
        reads = through(chain_of(self.model.middleware)[: self.layers[0]], given).flatten(0, -2)
        seen = through(chain_of(self.teacher[0]), given).flatten(0, -2)
        return reads, self._among_words(seen, self.model.decoder.embed(self.new_ids))


def _word_table(model: VLM) -> str:
    """The name of the embeddings of words."""
    patterns = names_of("decoder.@word_table", model_roles(model), "decoder")
    return next(name for name in own_tensors(model) if any(matches(name, pattern) for pattern in patterns))


@torch.no_grad()
def carry_units(old: Sequence[nn.Module], new: Sequence[nn.Module]) -> None:
    """Weights of a chain of layers go over to one of other inner widths, all but those of its last
    linear layer. Old units do what they did; more than these start afresh, and where there are fewer
    those stay that the next layer weighs most."""
    linear = [module for module in old if isinstance(module, nn.Linear)]
    units = torch.arange(linear[0].in_features)
    for theirs, own in zip(old, new, strict=True):
        if theirs is linear[-1]:
            return
        if isinstance(theirs, nn.Linear) and isinstance(own, nn.Linear):
            weight_HD, following_H = theirs.weight[:, units], linear[linear.index(theirs) + 1].weight.norm(dim=0)
            units = following_H.topk(min(len(following_H), own.out_features)).indices.sort().values
            own.weight[: len(units)] = 0
            own.weight[: len(units), : weight_HD.shape[1]] = weight_HD[units]
            if theirs.bias is not None:
                own.bias[: len(units)] = theirs.bias[units]
            continue
        for one, other in zip(theirs.parameters(), own.parameters(), strict=True):
            other[: len(units)] = one[units]
