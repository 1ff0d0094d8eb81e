"""Stage 3: the decoder answers questions about images (InternVL section 3.3, supervised
fine-tuning); and probes."""

from __future__ import annotations

from torch import Tensor

from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives.next_token import LABELLED, counts_of, weighs_samples
from lightning_internvl.stages.base import Batch, Stage


class SupervisedStage(Stage):
    """Next-token prediction on answers; visual tokens stand at placeholders."""

    objectives = ("next_token",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Next-token loss over the answers of one batch, a scalar."""
        hidden, labels = self.model.hidden_states(**batch)
        decoder, objective = self.model.decoder, self.model.objectives["next_token"]
        known = {"segments": batch.get("segments")} if weighs_samples(objective) else {}
        count = batch.get(COUNTS, {}).get(LABELLED)
        return {"next_token": objective(hidden, labels, decoder.head, shifts=shifts_labels(decoder), count=count, **known)}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Labelled tokens of the answers, and what their loss is divided by."""
        objective, shifts = self.model.objectives["next_token"], shifts_labels(self.model.decoder)
        return counts_of(objective, "next_token", batch["labels"], shifts=shifts, segments=batch.get("segments"))


class ProbeStage(Stage):
    """Classification by the probe that stands in the middleware's place (see
    `lightning_internvl.middleware.probe`): how much of what a picture shows can be read from the
    frozen tower's features (InternVL section 4.2)."""

    objectives = ("classification",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Classification loss of one batch, a scalar."""
        feats = self.features(batch, self.model.middleware.layers)
        return {"classification": self.model.objectives["classification"](self.model.middleware(feats), batch["labels"])}
