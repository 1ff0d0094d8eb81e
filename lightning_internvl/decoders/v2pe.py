"""A decoder whose positions go on by less than one with each visual token: variable visual position
encoding (Ge et al. 2024, arXiv 2412.09616, section 3.2; InternVL 3, section 2.1; released
`get_rope_pos_id`).

Letters: B rows, L text length, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.attention_masks import Segments, on_device, starts
from lightning_internvl.layers.basic import lowered


class V2PECausalLM(HFCausalLM):
    """A language model with rotary positions that counts visual tokens by a step of its own.

    Args:
        visual_step: by how much the position goes on with each visual token; 1: as with a word.
        visual_steps: from which one is drawn for each picture in training; None: `visual_step`.

    The other arguments are those of `HFCausalLM`.

    Raises:
        ValueError: for a step that is not above 0 and at most 1, and for a language model that
            counts no rotary positions.
    """

    inputs = ("visual_places", "segments", "right_padded")

    def __init__(self, *, visual_step: float = 1.0, visual_steps: Sequence[float] | None = None, **options: Any) -> None:
        given = [visual_step, *([] if visual_steps is None else visual_steps)]
        if (visual_steps is not None and not len(visual_steps)) or not all(0 < step <= 1 for step in given):
            form = "steps above 0, at most 1, as in visual_steps=[1, 0.5, 0.25]"
            raise ValueError(f"decoder.{visual_step=}, decoder.{visual_steps=}: {form}")
        super().__init__(**options)
        if not any(name.endswith("rotary_emb") for name, _ in self.lm.named_modules()):
            kind = self.lm.config.model_type
            raise ValueError(
                f"decoder.visual_step needs rotary positions, which model_type={kind!r} has not; take llama or qwen2"
            )
        self.visual_step, self.visual_steps = visual_step, visual_steps

    def positions(
        self, attention_mask_BL: Tensor, visual_places_BL: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """The position of each token: (B, L) float32, 0 for the first of a row or packed sample, 0 at
        padding.

        Visual tokens of a picture, which stand side by side, go on by its step; the word behind them
        stands at the next whole number and one more.
        """
        seen = attention_mask_BL.bool()
        visual = torch.zeros_like(seen) if visual_places_BL is None else visual_places_BL & seen
        places = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
        # the run that a token stands in, or behind which it stands
        before = F.pad(visual, (1, 0))[:, :-1]
        first = torch.where(visual & ~before, places, 0).cummax(dim=1).values
        step = self._drawn(seen).gather(1, first)
        moved = step * (places - first)  # of the run before a word that follows it
        words = 1 + torch.where(before & ~visual, moved.ceil() - moved, 0)
        steps = torch.where(visual, step, words) * seen
        counted = steps.cumsum(dim=1)
        if segments is None:
            begin = torch.where(seen, places, seen.shape[1]).amin(dim=1, keepdim=True).clamp(max=seen.shape[1] - 1)
        else:
            begin = on_device(starts(segments, seen.shape[1]), seen.device)
        return ((counted - counted.gather(1, begin.expand_as(places))) * seen).float()

    def _drawn(self, seen_BL: Tensor) -> Tensor:
        """The step of the picture that begins at each place (B, L), float64 so that sums are exact."""
        if not (self.training and self.visual_steps):
            return torch.full(seen_BL.shape, self.visual_step, dtype=torch.float64, device=seen_BL.device)
        choices = torch.tensor(self.visual_steps, dtype=torch.float64, device="cpu")
        return on_device(choices[torch.randint(len(choices), seen_BL.shape, device="cpu")], seen_BL.device)

    def hidden(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        *,
        visual_places: Tensor | None = None,
        segments: Segments | None = None,
        right_padded: bool = False,
    ) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H).

        Args:
            visual_places: bool (B, L), where visual tokens stand.
            segments, right_padded: as in `HFCausalLM`.
        """
        inputs = self.row_inputs(attention_mask_BL, segments, right_padded)
        inputs["position_ids"] = self.positions(attention_mask_BL, visual_places, segments)
        return self.lm.base_model(inputs_embeds=lowered(embeds_BLH), use_cache=False, **inputs)[0]

    @torch.no_grad()
    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded embeddings; new tokens count on from the
        last of the prompt."""
        places = {name: options.pop(name, None) for name in self.inputs}
        positions = self.positions(attention_mask_BL, places["visual_places"])
        return self.lm.generate(inputs_embeds=embeds_BLH, attention_mask=attention_mask_BL, position_ids=positions, **options)
