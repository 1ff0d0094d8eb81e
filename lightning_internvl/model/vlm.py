"""Encoder, middleware and decoder, composed.

Letters: B rows, L text length, N images of the batch, S side in pixels, T decoder tokens of an
image, H decoder width, E contrastive width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.data.collate.pairs_of_answers import COPIES
from lightning_internvl.layers.attention_masks import without_firsts
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.model.deep_features import DeepFeatures
from lightning_internvl.model.feature_cache import FeatureCache, features
from lightning_internvl.model.placeholders import EMPTY, Expanded, ImagePlaceholders, check_places, places_of
from lightning_internvl.model.videos import VIDEOS, join_pictures_and_videos, repeated
from lightning_internvl.objectives import NextToken
from lightning_internvl.protocols import Decoder, DeepTokens, Encoder, Middleware

PARTS = ("encoder", "middleware", "decoder", "objectives")


class Output(NamedTuple):
    """What a forward pass returns; fields that the call did not ask for are None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


class HiddenStates(NamedTuple):
    """States (B, L, H) after the decoder's final norm, and the labels (B, L) of the same rows."""

    hidden: Tensor
    labels: Tensor | None


class _Merged(NamedTuple):
    """Text and pictures as the decoder reads them.

    Attributes:
        embeds: (B, L, H).
        visual: visual tokens (N, T, D) for a decoder that attends to them.
        placeholders: how many there are; None where nobody knows.
        deep: for each block that the middleware feeds (B, L, H).
    """

    embeds: Tensor
    visual: Tensor | None = None
    placeholders: int | None = None
    deep: Sequence[Tensor] = ()


class VLM(nn.Module):
    """Holds the parts under the names of the checkpoint files; the losses live in stages, their
    parameters in `objectives`.

    Args:
        middleware: None for a tower alone, as a checkpoint may hold it.
        decoder: None in stages that need none.
        objectives: losses by name; those with parameters (logit scale, matching head) are saved
            with the model.
        image_token_id: the placeholder that visual tokens replace in the decoder's input, one for
            each of them.
        image_placeholders: where one placeholder stands for a whole picture instead, how rows are
            expanded.
        video_token_id: the placeholder of videos, where they have their own.
    """

    writer: ClassVar[Callable[..., None] | None] = None  # what `save_pretrained` calls

    # Modules with more members than the protocols list, which each stage checks for itself when it
    # is made: no static type says "a module and what this stage needs of it".
    encoder: Any
    middleware: Any
    decoder: Any

    def __init__(
        self,
        encoder: Encoder,
        middleware: Middleware | None = None,
        decoder: Decoder | None = None,
        *,
        objectives: dict[str, nn.Module] | None = None,
        image_token_id: int | None = None,
        image_placeholders: ImagePlaceholders | None = None,
        video_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.middleware, self.decoder = encoder, middleware, decoder
        self.deep_features = DeepFeatures(self.middleware, self.decoder)
        self.objectives = nn.ModuleDict(objectives or {})
        self.image_placeholders = image_placeholders
        self.image_token_id = image_placeholders.id if image_placeholders else image_token_id
        self.video_token_id = video_token_id
        self.feature_cache: FeatureCache | None = None  # of a stage with a frozen encoder
        self.config: dict[str, Any] | None = None  # of the official checkpoint it was loaded from

    # --- contrastive ----------------------------------------------------------------------------

    def encode_image(self, pixel_values: Tensor, mode: str = "c") -> Tensor:
        """(N, 3, S, S) -> (N, E), as the original; mode "c" or "g" where there are both."""
        states = self.encoder(pixel_values, layers=self.middleware.layers[:1])
        return self.middleware.embed_image(states, mode)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) -> (B, E), as the original returns it."""
        return self.middleware.embed_text(input_ids, attention_mask)

    def match(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the matching head for pairs, column 1 for a match: (B, 2)."""
        visual = self.encoder(pixel_values, layers=self.middleware.layers[:1])[0]
        stream = TextStream("itm", input_ids, attention_mask)
        ((queries, _),) = self.middleware.stream_states(visual, [stream])
        return self.objectives["itm"].logits(queries)

    # --- decoder --------------------------------------------------------------------------------

    def visual_tokens(self, pixel_values: Tensor, **inputs: Any) -> Tensor:
        """Images as the decoder reads them: (N, 3, S, S) -> (N, T, H), or all tokens in one row
        (tokens, H) where images differ.

        Args:
            inputs: what else encoder or middleware read, by the names that they list under
                `inputs`, and `picture_keys`.
        """
        return self._visual(pixel_values, inputs).tokens

    def _visual(self, pixel_values: Tensor, inputs: dict[str, Any]) -> DeepTokens:
        feats = features(self, pixel_values, self.middleware.layers, inputs, **_accepted_inputs(self.encoder, inputs))
        found = self.middleware(feats, **_accepted_inputs(self.middleware, inputs))
        return found if isinstance(found, DeepTokens) else DeepTokens(found, ())

    def placeholders(self, image_size: int | None = None) -> int:
        """Placeholders that one square picture takes in the decoder's text."""
        return 1 if self.attends else self.middleware.tokens_out(self.encoder.num_tokens(image_size))

    @property
    def attends(self) -> bool:
        """Whether the decoder reads visual tokens by attention of its own, so that one placeholder
        stands for a whole picture."""
        return "visual" in _inputs(self.decoder)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, **inputs: Any) -> Tensor:
        """Text embeddings with the visual tokens in place of the placeholders: (B, L, H).

        Args:
            inputs: what the parts read (see `visual_tokens`), and `pixel_values_videos`: videos go
                the way of pictures, with inputs that are called `video_...` where those of pictures
                are called `image_...`.

        Raises:
            ValueError: if placeholders and visual tokens differ in number.
        """
        return self._merge_visual_tokens(input_ids, pixel_values, inputs).embeds

    def visual_places(self, input_ids: Tensor) -> Tensor:
        """Where the placeholders of pictures and videos stand: (B, L) bool."""
        return places_of(input_ids, self.image_token_id) | places_of(input_ids, self.video_token_id)

    def visual_in_rows(
        self, most: int | None, input_ids: Tensor, pixel_values: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens of each row in order, (B, P, H), and which of them are there, (B, P).

        Args:
            most: placeholders of the row that has most; None on the meta device, where all rows
                have as many.
        """
        places = self.visual_places(input_ids)
        merged = self._merge_visual_tokens(input_ids, pixel_values, inputs)
        width = max((merged.placeholders or 0) // len(places) if most is None else most, 1)
        order = (~places).int().argsort(dim=1, stable=True)[:, :width]
        shown = places.gather(1, order)
        if merged.visual is None:
            seen = merged.embeds.gather(1, order[..., None].expand(*order.shape, merged.embeds.shape[-1]))[:, :, None]
        else:  # a placeholder stands for all tokens of a picture
            picture = (places.flatten().cumsum(dim=0) - 1).clamp(min=0).view_as(places).gather(1, order)
            seen = merged.visual[picture]
        less = width - order.shape[1]  # where a row of another process has more placeholders than rows here have tokens
        seen, shown = F.pad(seen, (0, 0, 0, 0, 0, less)), F.pad(shown, (0, less))
        return seen.flatten(1, 2), shown.repeat_interleave(seen.shape[2], dim=1)

    def _merge_visual_tokens(self, input_ids: Tensor, pixel_values: Tensor | None, inputs: dict[str, Any]) -> _Merged:
        embeds, places = self._embed_words(input_ids), places_of(input_ids, self.image_token_id)
        if hasattr(self.middleware, "as_squares"):
            pixel_values, inputs = self.middleware.as_squares(pixel_values, inputs)
        pixels, shares, inputs = join_pictures_and_videos(pixel_values, inputs)
        if pixels is None:
            return _Merged(embeds)
        if len(pixels) == 0:
            for kind in (self.image_token_id, self.video_token_id):
                if kind is not None:
                    check_places(input_ids == kind, 0, 0)
            # A batch without images still runs the visual parts, so that every rank has the same
            # parameters in its graph.
            own = hasattr(self.encoder, "blank")
            blank = self.encoder.blank(pixels) if own else {"pixel_values": _blank(pixels)}
            tokens, deep = self._visual(blank["pixel_values"], {**inputs, **blank})
            unseen = sum((one.sum() for one in deep), tokens.sum())
            return _Merged(embeds + 0.0 * unseen.to(embeds.dtype), placeholders=0)
        visual, deep = self._visual(pixels, inputs)
        copies = inputs.get(COPIES, 1)
        if self.attends:
            visual = visual.repeat(copies, *[1] * (visual.ndim - 1))
            check_places(places, len(visual), len(pixels))
            return _Merged(embeds, visual, len(visual))
        total = visual.shape[:-1].numel()
        film = total * shares[1] // len(pixels)
        if shares[1] and hasattr(self.middleware, "video_tokens"):
            film = self.middleware.video_tokens(self.encoder.num_tokens(pixels.shape[-1]), inputs)
        flat = "patches of " if pixels.ndim == 2 else ""
        kinds = [(places, f"{flat}image(s)")]
        if self.video_token_id is not None:
            kinds.append((places_of(input_ids, self.video_token_id), f"{flat}video(s)"))

        def placed(among: Tensor, tokens: Tensor) -> Tensor:
            """States (B, L, H) with visual tokens in the places of their kind."""
            parts = tokens.flatten(0, -2).to(among.dtype).split([total - film, film])
            for (where, kind), part, share in zip(kinds, parts, shares, strict=False):
                part = part.repeat(copies, 1)
                check_places(where, len(part), share, kind)
                among = among.masked_scatter(where[..., None], part)
            return among

        layers = [placed(torch.zeros_like(embeds), one) for one in deep]
        return _Merged(placed(embeds, visual), None, total * copies, layers)

    def _decoder_inputs(
        self, input_ids: Tensor, labels: Tensor | None, merged: _Merged, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """What a decoder may list under `inputs`."""
        videos = places_of(input_ids, self.video_token_id)
        places = {"visual_places": self.visual_places(input_ids), "video_places": videos}
        shown = {"visual": merged.visual, "visual_count": merged.placeholders}
        return {"input_ids": input_ids, "labels": labels, **places, **shown, **repeated(inputs)}

    def _embed_words(self, input_ids: Tensor) -> Tensor:
        if self.image_placeholders is None and 0 <= (self.image_token_id or 0) < getattr(self.decoder, "vocab_size", math.inf):
            return self.decoder.embed(input_ids)
        pictures = places_of(input_ids, self.image_token_id)
        words = self.decoder.embed(input_ids.masked_fill(pictures, 0).clamp(min=0))
        return words.masked_fill((input_ids == EMPTY)[..., None], 0.0)

    def expand(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        side: str | None = None,
    ) -> Expanded:
        """Rows in which every visual token has a placeholder of its own, as some have already.

        Args:
            side: where shorter rows are filled up; None: as `image_placeholders` says.
        """
        if self.image_placeholders is None:
            return Expanded(input_ids, attention_mask, labels, pixel_values)
        tokens = 0
        if pixel_values is not None:
            tokens = self.middleware.tokens_out(self.encoder.num_tokens(pixel_values.shape[-1]))
        placeholders = self.image_placeholders if side is None else replace(self.image_placeholders, side=side)
        return placeholders.expand(input_ids, attention_mask, labels, pixel_values, tokens)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> HiddenStates:
        """What the decoder makes of text and pictures.

        Args:
            inputs: what else the parts read, by the names that they list under `inputs`, and videos
                (see `embed`). A decoder may also list `input_ids`, `labels`, `visual_places` (bool
                (B, L), where visual tokens stand), `visual_count` (their number), `video_places`
                (which of them are of videos) and `visual` (see `attends`). With `segments` rows are
                packed (see `HFCausalLM`): the first token of a sample has no label, because nothing
                before it could judge it. With `copies` n the rows are n times as many, each group
                about the same pictures in the same order, which are encoded once.

        Raises:
            ValueError: for packed rows and a decoder that reads none.
        """
        input_ids, attention_mask, labels, pixel_values = self.expand(input_ids, attention_mask, labels, pixel_values)
        if (segments := inputs.get("segments")) is not None:
            if "segments" not in _inputs(self.decoder):
                name = type(self.decoder).__name__
                raise ValueError(f"{name} reads no packed rows; set data.packing=null")
            labels = labels if labels is None else without_firsts(labels, segments)
        merged = self._merge_visual_tokens(input_ids, pixel_values, inputs)
        known = _accepted_inputs(self.decoder, self._decoder_inputs(input_ids, labels, merged, inputs))
        with self.deep_features.shown(merged.deep):
            return HiddenStates(self.decoder.hidden(merged.embeds, attention_mask, **known), labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        mode: str = "c",
        **inputs: Any,
    ) -> Output:
        """With a decoder: logits (B, L, V) and, given labels, the loss. Without one: logits of all
        pairs of picture and text and, with `return_loss=True`, their loss; with
        `use_image_text_matching_head=True` those of the matching head (see `match`)."""
        if self.decoder is not None:
            hidden, labels = self.hidden_states(input_ids, attention_mask, pixel_values, labels, **inputs)
            loss = None
            if labels is not None:
                loss = NextToken()(hidden, labels, self.decoder.head, shifts=shifts_labels(self.decoder))
            return Output(loss=loss, logits=self.decoder.head(hidden))
        if pixel_values is None:
            raise ValueError("a model without a decoder compares texts with pictures: give pixel_values")
        if inputs.get("use_image_text_matching_head"):
            logits = self.match(pixel_values, input_ids, attention_mask)
            return Output(logits_per_image=logits, logits_per_text=logits.T)
        contrast = self.objectives["itc"]
        image = F.normalize(self.encode_image(pixel_values, mode), dim=-1)
        text = F.normalize(self.encode_text(input_ids, attention_mask), dim=-1)
        logits = contrast.logits(image, text)
        loss = contrast(image, text) if inputs.get("return_loss") else None
        return Output(loss=loss, logits_per_image=logits, logits_per_text=logits.T)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New ids only. With a decoder `options` are those of transformers and prompts are padded
        on the left; without one the middleware writes a caption after the prompt `input_ids` (see
        `QLLaMA.generate`)."""
        if self.decoder is None:
            visual = self.encoder(pixel_values, layers=self.middleware.layers[:1])[0]
            return self.middleware.generate(visual, input_ids, **options)
        if input_ids is None:
            raise ValueError("a decoder answers a prompt: give input_ids")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, mask, _, pixel_values = self.expand(input_ids, mask, None, pixel_values, side="left")
        inputs = {name: options.pop(name) for name in list(options) if self.reads(name)}
        merged = self._merge_visual_tokens(input_ids, pixel_values, inputs)
        known = _accepted_inputs(self.decoder, self._decoder_inputs(input_ids, None, merged, inputs))
        with self.deep_features.shown(merged.deep, once=True):
            return self.decoder.generate(merged.embeds, mask, **known, **options)

    def reads(self, name: str) -> bool:
        """Whether an input is one of pictures or videos, beside `pixel_values`, or listed by a part."""
        listed = (one for part in (self.encoder, self.middleware, self.decoder) for one in _inputs(part))
        return name in (VIDEOS, COPIES, "picture_keys", *listed) or name.startswith("video_")

    def save_pretrained(self, path: str | Path, layout: str | None = None) -> None:
        """Write the layout that the original library loads (see
        `lightning_internvl.checkpoints.pretrained`).

        Raises:
            ValueError: as the writer, which `lightning_internvl.checkpoints` sets when it is
                imported.
        """
        if VLM.writer is None:
            advice = "import lightning_internvl.checkpoints, which sets VLM.writer"
            raise ValueError(f"nothing writes models yet: {advice}")
        VLM.writer(self, path, layout=layout)


def shifts_labels(decoder: nn.Module) -> bool:
    """Whether the state before a token judges it; False for encoder-decoders."""
    return getattr(decoder, "shifts", True)


def _inputs(part: nn.Module) -> tuple[str, ...]:
    """What a part reads beside the common inputs."""
    return getattr(part, "inputs", ())


def _accepted_inputs(part: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in _inputs(part) if name in inputs}


def _blank(pixels: Tensor) -> Tensor:
    """One picture of nothing, of the size that the batch would have."""
    return pixels.new_zeros(1, *pixels.shape[1:])
