"""A probe on the frozen tower: how much of what a picture shows can be read from its features (InternVL section 4.2)."""

from __future__ import annotations

from torch import Tensor

from lightning_internvl.stages.base import Batch, Stage


class ProbeStage(Stage):
    """Classification by the probe that stands in the middleware's place (see `lightning_internvl.middleware.probe`)."""

    objectives = ("classification",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Classification loss of one batch, a scalar."""
        feats = self.features(batch, self.model.middleware.layers)
        return {"classification": self.model.objectives["classification"](self.model.middleware(feats), batch["labels"])}
