"""The decoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2 or Qwen3 with rotary positions of three
streams, time, row and column (Wang et al. 2024, section 2.1; M-RoPE of the official
`modeling_qwen2_vl.py`); in Qwen2.5-VL time is that of the clock (Bai et al. 2025, section 2.1.2), in
Qwen3-VL it is written before each step of a video (Bai et al. 2025, Qwen3-VL, section 2.3).

Letters: B rows, L text length, H width, N pictures or videos, M merged visual tokens of all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.mrope_models import MRopeConfigs, check_section, kind_of
from lightning_internvl.layers.attention_masks import Segments, on_device, starts
from lightning_internvl.layers.basic import lowered

Grid = tuple[int, int, int]


class MRopeCausalLM(HFCausalLM):
    """A Qwen2 or Qwen3 that is told when and where in a picture or video each visual token stands.

    Args:
        merge_size: patches to a side that became one visual token; grids count patches.
        time_counts: whether text after a video goes on behind its last step also where that lies
            beyond its rows and columns, as in the released code of 2024; False: behind rows and
            columns alone, as in transformers 5. They differ for long videos of small frames only.
        tokens_per_second: by how much the positions of a video go on in a second; None: by one with
            each of its steps, whatever time passes between them.
        steps_apart: whether the steps of a video are pictures of their own, each behind the text
            that tells its time, as in Qwen3-VL.
        pretrained: a folder or id of a Qwen2 or Qwen3; it may hold a plain one, as the first stage
            starts from it.

    The other arguments are those of `HFCausalLM`; `config.rope_parameters.mrope_section` says how
    many of the frequencies of a head turn with time, row and column.
    """

    inputs = (
        "visual_places", "video_places", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "segments", "right_padded",
    )  # fmt: skip

    def __init__(
        self,
        *,
        merge_size: int = 2,
        time_counts: bool = False,
        tokens_per_second: float | None = None,
        steps_apart: bool = False,
        **options: Any,
    ) -> None:
        kind = kind_of(options.get("pretrained"), options.get("config") or {})
        self.configs, self.models = MRopeConfigs(kind), kind.model
        super().__init__(**options)
        if steps_apart and (tokens_per_second is not None or time_counts):
            no_time = "leaves no time within a video to count; leave tokens_per_second and time_counts out"
            raise ValueError(f"decoder.steps_apart=true {no_time}")
        self.merge_size, self.time_counts, self.tokens_per_second = merge_size, time_counts, tokens_per_second
        self.steps_apart = steps_apart
        check_section(self.lm.config)

    def positions(
        self,
        attention_mask: Tensor,
        visual_places: Tensor | None = None,
        video_places: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Grid] | None = None,
        video_grid_thw: Tensor | Sequence[Grid] | None = None,
        second_per_grid_ts: Tensor | Sequence[float] | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Time, row and column of every token: (3, B, L), 0 at padding.

        A text token has the same number in all streams. A picture begins where the text before it
        ended: its tokens add their step, row and column on the merged grid, and the text goes on
        behind the largest.

        Args:
            visual_places: bool (B, L), where visual tokens stand, and `video_places` which of them
                are of videos.
            second_per_grid_ts: the seconds from one step of each video to its next (videos,), which
                `tokens_per_second` counts in.
            segments: for each row the lengths of its samples, where rows are packed; each begins at
                0 again.

        Raises:
            ValueError: if grids and places differ in number, or where time counts and a video has
                none, or one that does not go on.
        """
        seen = attention_mask.bool()
        none = torch.zeros_like(seen)
        # Visual tokens of an encoder without grids (a fixed number for each picture) count on like
        # words.
        visual = none
        if visual_places is not None and not (image_grid_thw is None and video_grid_thw is None):
            visual = visual_places & seen
        videos = none if video_places is None else video_places & visual
        steps = seen.long()  # by how much a token moves the text behind it
        inside = torch.zeros(*seen.shape, 3, dtype=torch.long, device=seen.device)
        stills, films = _listed(image_grid_thw), _listed(video_grid_thw)
        if self.steps_apart:
            films = [(1, h, w) for t, h, w in films for _ in range(t)]
        shown = (visual & ~videos, stills, [1] * len(stills)), (videos, films, self._paces(films, second_per_grid_ts))
        for places, grids, paces in shown:
            offsets, moves = self._inside(grids, paces, seen.device)
            _check(places, len(moves))
            inside = inside.masked_scatter(places[..., None], offsets)
            steps = steps.masked_scatter(places, moves)
        before = steps.cumsum(dim=1) - steps
        if segments is not None:
            firsts = on_device(starts(segments, seen.shape[1]), seen.device)
            before = before - before.gather(1, firsts)
        # The last token of a picture moves the text on, so all of them see the same start.
        return ((before[..., None] + inside) * seen[..., None]).permute(2, 0, 1)

    def _paces(self, grids: list[Grid], seconds: Tensor | Sequence[float] | None) -> Sequence[Any]:
        """By how much time goes on with each step of each video."""
        if self.tokens_per_second is None or not grids:
            return [1] * len(grids)
        name, counts = "second_per_grid_ts", f"decoder.tokens_per_second={self.tokens_per_second} counts in it"
        if seconds is None:
            raise ValueError(f"videos need {name}, the seconds from one step of each to its next: {counts}")
        if len(seconds) != len(grids):
            raise ValueError(f"{name} has {len(seconds)} values for {len(grids)} videos; it must have one for each")
        seconds = seconds.cpu() if isinstance(seconds, Tensor) else seconds
        if odd := [float(step) for step in seconds if not 0 < step < math.inf]:
            raise ValueError(f"{name} has {odd[0]}: time must go on from one step of a video to its next")
        return [self.tokens_per_second * step for step in seconds]

    def _inside(self, grids: list[Grid], paces: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Time, row and column of each visual token within its picture (M, 3), and by how much it
        moves the text (M,)."""
        offsets, moves = [torch.zeros(0, 3, dtype=torch.long, device=device)], []
        for (t, h, w), pace in zip(grids, paces, strict=True):
            h, w = h // self.merge_size, w // self.merge_size
            times = (torch.arange(t, device="cpu") * pace).long()
            axes = [on_device(times, device), *(torch.arange(n, device=device) for n in (h, w))]
            offsets.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2))
            moves += [0] * (t * h * w - 1) + [max(int(times[-1]) + 1, h, w) if self.time_counts else max(h, w)]
        return torch.cat(offsets), on_device(torch.tensor(moves, dtype=torch.long, device="cpu"), device)

    def hidden(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, *, right_padded: bool = False, **where: Any) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H).

        Args:
            right_padded: as in `HFCausalLM`.
            where: the arguments of `positions`.
        """
        # segments are checked before anything is counted by them
        inputs = self.row_inputs(attention_mask_BL, where.get("segments"), right_padded)
        inputs["position_ids"] = self.positions(attention_mask_BL, **where)
        return self.lm.model(inputs_embeds=lowered(embeds_BLH), use_cache=False, **inputs)[0]

    @torch.no_grad()
    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded prompts given as embeddings; options as
        in transformers, and the arguments of `positions`. New tokens count on from the last of the
        prompt."""
        options.pop("mm_token_type_ids", None)  # of transformers; the placeholders say the same
        where = {name: options.pop(name) for name in self.inputs if name in options}
        where.pop("right_padded", None)  # prompts are padded on the left
        position_ids = self.positions(attention_mask_BL, **where)
        inputs = {"attention_mask": attention_mask_BL, "position_ids": position_ids}
        return self.lm.generate(inputs_embeds=embeds_BLH, **inputs, **options)


def _listed(grids: Tensor | Sequence[Grid] | None) -> list[Grid]:
    if grids is None:
        return []
    return [tuple(grid) for grid in (grids.tolist() if isinstance(grids, Tensor) else grids)]


def _check(places: Tensor, tokens: int) -> None:
    """As many places as visual tokens; on a GPU that was checked when they were put there."""
    if not places.is_meta and not places.is_cuda and int(places.sum()) != tokens:
        raise ValueError(
            f"the grids give {tokens} visual tokens, the text holds {int(places.sum())} placeholders; "
            "decoder.merge_size, the grids (image_grid_thw, video_grid_thw) or the text do not fit together"
        )
