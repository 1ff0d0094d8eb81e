"""Encoder, middleware and decoder, composed.

Letters: B rows, L text length, N images of the batch, S side in pixels, T decoder tokens of an image, H decoder width,
E contrastive width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.objectives import NextToken
from lightning_internvl.placeholders import EMPTY, Expanded, ImagePlaceholders
from lightning_internvl.protocols import Decoder, Encoder, Middleware

PARTS = ("encoder", "middleware", "decoder", "objectives")


class Output(NamedTuple):
    """What a forward pass returns; fields that the call did not ask for are None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


class Read(NamedTuple):
    """States (B, L, H) after the decoder's final norm, and the labels (B, L) of the same rows."""

    hidden: Tensor
    labels: Tensor | None


class VLM(nn.Module):
    """Holds the parts under the names of the checkpoint files; the losses live in stages, their parameters in `objectives`.

    Args:
        middleware: None for a tower alone, as a checkpoint may hold it.
        decoder: None in stages that need none.
        objectives: losses by name; those with parameters (logit scale, matching head) are saved with the model.
        image_token_id: the placeholder that visual tokens replace in the decoder's input, one for each of them.
        image_placeholders: where one placeholder stands for a whole picture instead, how rows are expanded.
    """

    def __init__(
        self,
        encoder: Encoder,
        middleware: Middleware | None = None,
        decoder: Decoder | None = None,
        *,
        objectives: dict[str, nn.Module] | None = None,
        image_token_id: int | None = None,
        image_placeholders: ImagePlaceholders | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.middleware, self.decoder = encoder, middleware, decoder
        self.objectives = nn.ModuleDict(objectives or {})
        self.image_placeholders = image_placeholders
        self.image_token_id = image_placeholders.id if image_placeholders else image_token_id
        self.config: dict[str, Any] | None = None  # of the official checkpoint it was loaded from

    # --- contrastive ------------------------------------------------------------------------------------------------

    def encode_image(self, pixel_values: Tensor, mode: str = "c") -> Tensor:
        """(N, 3, S, S) -> (N, E), as the original returns it; mode "c" or "g" where the system has both."""
        return self.middleware.embed_image(self.encoder(pixel_values), mode)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) -> (B, E), as the original returns it."""
        return self.middleware.embed_text(input_ids, attention_mask)

    # --- decoder ----------------------------------------------------------------------------------------------------

    def visual_tokens(self, pixel_values: Tensor, **inputs: Any) -> Tensor:
        """Images as the decoder reads them: (N, 3, S, S) -> (N, T, H), or all tokens in one row (tokens, H) where images differ.

        Args:
            inputs: what else encoder or middleware read, by the names that they list under `inputs`.
        """
        feats = self.encoder(pixel_values, layers=self.middleware.layers, **_taken(self.encoder, inputs))
        return self.middleware(feats, **_taken(self.middleware, inputs))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, **inputs: Any) -> Tensor:
        """Text embeddings with the visual tokens in place of the placeholders: (B, L, H).

        Raises:
            ValueError: if placeholders and visual tokens differ in number.
        """
        embeds = self._words(input_ids)
        if pixel_values is None:
            return embeds
        places = input_ids == self.image_token_id
        if len(pixel_values) == 0:
            _check_places(places, 0, 0)
            # A batch without images still runs the visual parts, so that every rank has the same parameters in its graph.
            blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            return embeds + 0.0 * self.visual_tokens(blank, **inputs).sum().to(embeds.dtype)
        visual = self.visual_tokens(pixel_values, **inputs).flatten(0, -2).to(embeds.dtype)
        _check_places(places, len(visual), len(pixel_values))
        return embeds.masked_scatter(places[..., None], visual)

    def _words(self, input_ids: Tensor) -> Tensor:
        if self.image_placeholders is None:
            return self.decoder.embed(input_ids)
        words = self.decoder.embed(input_ids.clamp(min=0))
        return words.masked_fill((input_ids == EMPTY)[..., None], 0.0)

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Expanded:
        """Rows in which every visual token has a placeholder of its own; the rows themselves where that is so already."""
        if self.image_placeholders is None:
            return Expanded(input_ids, attention_mask, labels, pixel_values)
        tokens = 0
        if pixel_values is not None:
            tokens = self.middleware.tokens_out(self.encoder.num_tokens(pixel_values.shape[-1]))
        return self.image_placeholders.expand(input_ids, attention_mask, labels, pixel_values, tokens)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Read:
        """What the decoder makes of text and pictures.

        Args:
            inputs: what else the parts read, by the names that they list under `inputs`. A decoder may also list `input_ids`,
                `labels`, and `visual_places` (bool (B, L), where visual tokens stand).
        """
        input_ids, attention_mask, labels, pixel_values = self.expand(input_ids, attention_mask, labels, pixel_values)
        embeds = self.embed(input_ids, pixel_values, **inputs)
        known = {"input_ids": input_ids, "labels": labels, "visual_places": input_ids == self.image_token_id, **inputs}
        return Read(self.decoder.hidden(embeds, attention_mask, **_taken(self.decoder, known)), labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        mode: str = "c",
        **inputs: Any,
    ) -> Output:
        """With a decoder: logits (B, L, V) and, given labels, the loss. Without one: scaled cosine similarities of all pairs."""
        if self.decoder is None:
            image = F.normalize(self.encode_image(pixel_values, mode), dim=-1)
            text = F.normalize(self.encode_text(input_ids, attention_mask), dim=-1)
            logits = self.objectives["itc"].scale * image @ text.T
            return Output(logits_per_image=logits, logits_per_text=logits.T)
        hidden, labels = self.read(input_ids, attention_mask, pixel_values, labels, **inputs)
        loss = None if labels is None else NextToken()(hidden, labels, self.decoder.head)
        return Output(loss=loss, logits=self.decoder.head(hidden))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New ids only. With a decoder `options` are those of transformers and prompts are padded on the left; without one the
        middleware writes a caption after the prompt `input_ids` (see `QLLaMA.generate`)."""
        if self.decoder is None:
            return self.middleware.generate(self.encoder(pixel_values)[0], input_ids, **options)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, mask, _, pixel_values = self.expand(input_ids, mask, None, pixel_values)
        inputs = {name: options.pop(name) for name in [*_inputs(self.encoder), *_inputs(self.middleware)] if name in options}
        return self.decoder.generate(self.embed(input_ids, pixel_values, **inputs), mask, **options)

    def save_pretrained(self, path: str | Path, layout: str | None = None) -> None:
        """Write the layout that the original library loads (see `lightning_internvl.checkpoints.pretrained`)."""
        from lightning_internvl.checkpoints.pretrained import save_pretrained

        save_pretrained(self, path, layout=layout)


def _inputs(part: nn.Module) -> tuple[str, ...]:
    """What a part reads beside the common inputs."""
    return getattr(part, "inputs", ())


def _taken(part: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in _inputs(part) if name in inputs}


def _check_places(places_BL: Tensor, tokens: int, images: int) -> None:
    if places_BL.is_meta:  # shapes only, nothing to count
        return
    message = (
        f"{images} image(s) give {tokens} visual tokens, but the text holds another number of placeholders; "
        "the encoder's image size, the middleware or max_length differ from what the text was prepared for"
    )
    if places_BL.is_cuda:
        torch._assert_async(places_BL.sum() == tokens, message)  # an error without a host-device sync
    elif int(places_BL.sum()) != tokens:
        raise ValueError(f"{message} ({int(places_BL.sum())} placeholders)")
