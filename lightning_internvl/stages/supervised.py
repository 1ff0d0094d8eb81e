"""Stage 3: the decoder answers questions about images (InternVL section 3.3, supervised
fine-tuning); and probes."""

from __future__ import annotations

from torch import Tensor

from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives.next_token import LABELLED, labelled_tokens
from lightning_internvl.stages.base import Batch, Stage


class SupervisedStage(Stage):
    """Next-token prediction on answers; visual tokens stand at placeholders."""

    objectives = ("next_token",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Next-token loss over the answers of one batch, a scalar."""
        hidden, labels = self.model.hidden_states(**batch)
        decoder, objective = self.model.decoder, self.model.objectives["next_token"]
        known = {"count": batch.get(COUNTS, {}).get(LABELLED), "segments": batch.get("segments")}
        return {"next_token": objective(hidden, labels, decoder.head, shifts=shifts_labels(decoder), **known)}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Labelled tokens of the answers, and what their loss is divided by."""
        labels, shifts = batch["labels"], shifts_labels(self.model.decoder)
        weight = self.model.objectives["next_token"].weight(labels, shifts=shifts, segments=batch.get("segments"))
        return {"next_token": weight, LABELLED: labelled_tokens(labels, shifts=shifts)}


class ProbeStage(Stage):
    """Classification by the probe that stands in the middleware's place (see
    `lightning_internvl.middleware.probe`): how much of what a picture shows can be read from the
    frozen tower's features (InternVL section 4.2)."""

    objectives = ("classification",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Classification loss of one batch, a scalar."""
        feats = self.features(batch, self.model.middleware.layers)
        return {"classification": self.model.objectives["classification"](self.model.middleware(feats), batch["labels"])}
