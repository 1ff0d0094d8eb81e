"""What a part must offer: three protocols; a part is a Python file and a YAML file.

A part that reads more than what is listed here names it in a class attribute `inputs`, a tuple of
keyword names (`image_grid_thw`, `qformer_input_ids`); batches carry them under these names, and the
model passes each on to the parts that list it.

A part may say in a class attribute `roles`, a mapping of roles to patterns of its own names, what
of it has a role that rules name (`encoder.@patch_embedding`; see
`lightning_internvl.stages.roles`). In a part without them such rules apply to nothing.

A part, or a module at any depth of one, may name in a class attribute `never_decays` the parameters
below it that weight decay would only pull to zero (`("latents", "rel_pos_*")`); of vectors, of
tables in `nn.Embedding` and of tokens (1, n, D) nothing need be said (see
`lightning_internvl.layers.tables`).

What a class gives and needs of others it says in class attributes with plain values
(`lightning_internvl.config.fit` lists them), so that parts that do not fit are told before they are
built.

A middleware whose pictures and videos differ in tokens says with `video_tokens(tokens_in, inputs)` how many of all are
of videos, and with `as_squares(pixel_values, inputs)` how it reads what the original's processor gives (see
`lightning_internvl.middleware.anyres`).

A middleware that is linear layers one after the other, with norms and activations between them, names in `projection` the
module that holds them, a layer or a `Sequential`; these can be solved (see `lightning_internvl.stages.transplant`).

An encoder whose pictures are no (N, 3, S, S) says with `blank(pixel_values)` what it reads in a
batch without any: its inputs by name. A decoder that lists `visual` gets the visual tokens (N, T,
D) for attention of its own instead of having them inserted. One that lists `segments` reads packed
rows: it gets for each row the lengths of its samples, and lets none see another.

A middleware may feed blocks of the decoder too (DeepStack): it says in `into` which, and returns
`DeepTokens`. A decoder whose `sharding_units` begin with its blocks says `feeds_blocks = True`.

Letters: N images, S side in pixels, P visual tokens, D encoder width, T decoder tokens of an image,
H decoder width, L text length, E contrastive width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Encoder(Protocol):
    """Pixels to visual tokens."""

    dim: int
    image_size: int

    def num_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one image."""

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""

    def __call__(self, pixels_N3SS: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Hidden states (N, P, D) of the layers asked for."""


@runtime_checkable
class Middleware(Protocol):
    """Visual tokens to what the decoder reads; `layers` names the hidden states it wants."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The encoder's hidden states that it reads."""

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens of one image."""

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""

    def __call__(self, feats: list[Tensor]) -> Tensor:
        """One (N, P, D) a layer -> (N, T, H)."""


class DeepTokens(NamedTuple):
    """What a middleware returns that feeds blocks of the decoder.

    Attributes:
        tokens: (N, T, H), which stand in the text.
        deep: for each number in the middleware's `into` (N, T, H), which is added where the tokens
            stand to what the decoder's block of that number, counted from 0, has made of them.
    """

    tokens: Tensor
    deep: Sequence[Tensor]


@runtime_checkable
class TextMiddleware(Middleware, Protocol):
    """A middleware that also reads text, as contrastive and generative stages need."""

    def embed_image(self, feats: list[Tensor], mode: str = "c") -> Tensor:
        """(N, E)"""

    def embed_text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, E)"""


@runtime_checkable
class Decoder(Protocol):
    """The language model that writes the answer."""

    dim: int

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""

    def embed(self, ids_BL: Tensor) -> Tensor:
        """(B, L, H)"""

    def hidden(self, embeds_BLH: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """(B, L, H), after the final norm"""

    def head(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)"""

    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """(B, new tokens)"""


@runtime_checkable
class HasShardingUnits(Protocol):
    """A part with blocks, which are sharded, compiled and recomputed one by one."""

    def sharding_units(self) -> list[nn.Module]:
        """These blocks, in the order of the forward pass."""


@runtime_checkable
class HasTensorPlan(Protocol):
    """A part that tensor parallelism can divide."""

    def tensor_plan(self) -> TensorPlan:
        """Its layers that are divided."""


class Part(nn.Module):
    """Encoders, middlewares and decoders.

    Attributes:
        settings: the arguments of its constructor by name, those of a base class that they were
            handed on to among them.
    """

    settings: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _remembering(vars(cls)["__init__"]))  # noqa: B010 (a method)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of a part with the same architecture: `_target_` and settings in plain
        values. It is that of the part as it was made: a table of positions that was resized since
        has its first size."""
        own = {name: value.config if isinstance(value, Part) else value for name, value in self.settings.items()}
        own |= getattr(self, "without_source", {})
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **own}


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)
    others = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(init)
    def wrapped(self: Part, *args: Any, **kwargs: Any) -> None:
        if "settings" not in self.__dict__:  # the outermost class has been told everything
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            given |= given.pop(others, {}) if others else {}
            self.__dict__["settings"] = {name: value for name, value in given.items() if name != "self"}
        init(self, *args, **kwargs)

    return wrapped


class TensorPlan(NamedTuple):
    """How a part is divided.

    Attributes:
        columns, rows: patterns of names of linear layers, below the part.
        counts: numbers that a share must be a whole part of (heads, widths), by their names in
            messages.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    counts: Mapping[str, int]
