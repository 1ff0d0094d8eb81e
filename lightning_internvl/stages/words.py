"""A start for a new connector in front of a language model that knows its words: visual tokens are drawn to those of captions.

The language model does not run, only its table of embeddings is read, so a step costs little more than the tower. What
follows, the usual alignment through the whole model, starts from visual tokens that lie where words lie, and at their length,
instead of from noise many times as loud.

Letters: B pictures, T visual tokens, L text length, H decoder width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.objectives.next_token import IGNORED
from lightning_internvl.stages.base import Batch, Stage


class WordStage(Stage):
    """Draws the mean of a picture's visual tokens to the mean embedding of the words that describe it, and away from the words of
    other pictures (ITC), on batches of one picture and one description each."""

    objectives = ("itc",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`itc` between both means, each less its mean over the batch, and `distance`, squared, in units of the words' spread."""
        words_BH = self._words(batch["input_ids"], batch["labels"]).float()
        seen_BH = self.model.visual_tokens(batch["pixel_values"]).float().mean(dim=1)
        itc = self.model.objectives["itc"](seen_BH - seen_BH.mean(dim=0), words_BH - words_BH.mean(dim=0))
        return {"itc": itc, "distance": F.mse_loss(seen_BH, words_BH) / words_BH.var()}

    def _words(self, ids_BL: Tensor, labels_BL: Tensor) -> Tensor:
        """The mean embedding of the words that are learnt in each row: (B, H)."""
        described_BL1 = (labels_BL != IGNORED)[..., None]
        words_BLH = self.model.decoder.embed(ids_BL).detach() * described_BL1
        return words_BLH.sum(dim=1) / described_BL1.sum(dim=1)
