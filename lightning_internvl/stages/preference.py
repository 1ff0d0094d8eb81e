"""Preference optimisation: the decoder learns which of two answers about a picture is better (InternVL
2.5-MPO, 3 and 3.5; DPO, KTO, ORPO, SimPO).

A batch has the rows of all chosen answers and behind them those of the rejected ones; both read the
same visual tokens, which are computed once. Letters: P pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.console import console
from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.distributed.collectives import gather_objects, global_mean
from lightning_internvl.files import read_json, write_json
from lightning_internvl.layers import peft
from lightning_internvl.model.reference_scores import Scores, looked_up, name_of_reference, read_scores, write_scores
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives.next_token import LABELLED, labelled_tokens
from lightning_internvl.objectives.preference import GENERATION, Pairs
from lightning_internvl.stages.base import Batch, Stage

ADAPTERS_OFF = "adapters off"  # in place of a file: the reference is the model without them


class PreferenceStage(Stage):
    """Learns from pairs of answers by `objectives.preference` (see
    `lightning_internvl.objectives.preference`); `objectives.next_token` judges their tokens.

    The reference is what the stage starts from. Where all that trains are fresh adapters, it is the
    model without them. Else its log-probabilities are computed before the first step, once for each
    sample, and kept in `references`.

    Args:
        references: a folder that runs share; None: the stage's own in the run.
        settings: of `Stage`. The objective's weights of its terms hold where `weights` names none.
    """

    objectives = ("next_token", "preference")

    def __init__(self, *given: Any, references: str | None = None, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.objective = self.model.objectives["preference"]
        self.weights = {**self.objective.weights, **self.weights}
        self.references = Path(references) if references else self.folder / "references"
        # Before a reference is found, as in a plan, the model is its own: the stage is at its start.
        self.scores: Scores | None = None
        self.adapters_off = False

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the objective, a scalar each."""
        pairs = self._pairs(batch)
        found = self.objective(pairs)
        tokens, number = pairs.chosen_tokens.sum(), torch.full_like(pairs.chosen_tokens.sum(), len(pairs.chosen))
        losses = {name: global_mean(x.sum(), tokens if name == GENERATION else number) for name, x in found.items()}
        self.watched = self._measures(pairs)
        return losses

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs; of the loss of writing the tokens of chosen answers."""
        labels, shifts = batch["labels"], shifts_labels(self.model.decoder)
        chosen = labelled_tokens(labels[: len(labels) // 2], shifts=shifts)
        terms = dict.fromkeys(self.objective.weights, float(len(batch["keys"])))
        return {
            **terms,
            **({GENERATION: chosen} if GENERATION in terms else {}),
            LABELLED: labelled_tokens(labels, shifts=shifts),
        }

    def _pairs(self, batch: Batch) -> Pairs:
        sums, tokens = self._log_probabilities(batch)
        chosen, rejected = sums.chunk(2)
        if not self.objective.needs_reference:
            return Pairs(chosen, rejected, *tokens.chunk(2))
        if self.adapters_off:
            with torch.no_grad(), self.evaluating(), peft.without_adapters(self.model):
                reference = self._log_probabilities(batch)[0].chunk(2)
        elif self.scores is not None:
            reference = looked_up(self.scores, batch["pair_keys"], batch["keys"], sums.device)
        else:
            reference = chosen.detach(), rejected.detach()
        return Pairs(chosen, rejected, *tokens.chunk(2), *reference)

    def _log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the answers of all rows (2 P,), and the tokens of each."""
        hidden, labels = self.model.hidden_states(**batch)
        decoder, judge = self.model.decoder, self.model.objectives["next_token"]
        count, segments = batch.get(COUNTS, {}).get(LABELLED), batch.get("segments")
        return judge.log_probabilities(
            hidden, labels, decoder.head, shifts=shifts_labels(decoder), count=count, segments=segments
        )

    @torch.no_grad()
    def _measures(self, pairs: Pairs) -> dict[str, Tensor]:
        """What is logged beside the losses, a scalar each: the rewards that the model implies, their
        margin, how often the chosen answer has the larger one, and, with a reference, how far the
        model has moved from it (an estimate of the KL divergence from the answers at hand)."""
        chosen, rejected = self.objective.rewards(pairs)
        margins = chosen - rejected
        found = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": margins, "accuracy": (margins > 0).float()}
        if self.objective.needs_reference:
            found["kl"] = torch.cat(pairs.ratios)
        return {name: x.mean() for name, x in found.items()}

    # --- the reference --------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Find the reference; of a stage that is resumed the one that it began with."""
        super().on_fit_start()
        if not self.objective.needs_reference:
            return
        note = self.folder / "reference.json"
        found = read_json(note) if self.start_step else None
        if found is None:
            found = self.use(self._new_reference)
            if self.trainer.is_global_zero:
                write_json(note, found)
        if found == ADAPTERS_OFF:
            self.adapters_off = True
        else:
            self.scores = read_scores(Path(found)) if self.scores is None else self.scores

    def _new_reference(self) -> str:
        """The file of the scores, or that there is no need of one."""
        trained = [name for name, _ in self.model.named_parameters() if self.plan.ever_trains(name)]
        own = [name for name in trained if not name.startswith("objectives.")]
        if all(map(peft.is_update, own)) and peft.are_fresh(self.model):
            console.print("reference: the model with its adapters off", soft_wrap=True)
            return ADAPTERS_OFF
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # of a connector
        processor = data.collate.processor
        fault = None
        if processor.random:
            fault = f"{type(processor).__name__} draws another part of a picture each time; choose another processor"
        elif processor.jpeg_quality:
            fault = f"data.jpeg_quality={list(processor.jpeg_quality)} changes a picture each time; set it to null"
        if fault:
            raise ValueError(f"stages.{self.name}: scores of a reference are computed once: {fault}, or train adapters alone")
        name = name_of_reference(self.model, processor, self.parts.get("quantization") or {})
        file = (self.references / f"{name}.safetensors").absolute()
        known = read_scores(file)
        self.scores = {**known, **self._computed(data, known)}
        if self.trainer.is_global_zero and self.scores.keys() != known.keys():
            write_scores(file, self.scores)
        console.print(f"reference: {len(self.scores):,} pairs, {len(known):,} of them known before ({file})", soft_wrap=True)
        return str(file)

    def _computed(self, data: Any, known: Scores) -> Scores:
        """The scores of what the stage will read; each process computes its share."""
        found: Scores = {}
        with torch.no_grad(), self.evaluating(), self.trainer.precision_plugin.forward_context():
            for batch in data.every_batch():
                if known.keys() >= set(batch["pair_keys"]) and not self.is_sharded:
                    continue
                batch = data.transfer_batch_to_device(batch, self.device, 0)
                sums = self._log_probabilities(batch)[0].float().cpu().view(2, -1).T.tolist()
                found |= {key: (chosen, rejected) for key, (chosen, rejected) in zip(batch["pair_keys"], sums, strict=True)}
        return {key: scores for share in gather_objects(found) for key, scores in share.items()}
