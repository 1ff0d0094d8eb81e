"""DeepStack: the tokens of one encoder layer stand in the text, and those of others, each through a
connector of its own, are added where these stand to what blocks of the decoder make of them (Meng et
al. 2024, section 3.2, with features of several layers as in Qwen3-VL, official `modeling_qwen3_vl.py`).

Letters: N images, P visual tokens, D encoder width, T decoder tokens of an image, H decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from lightning_internvl.middleware.connector import projection
from lightning_internvl.middleware.patch_merger import PatchMerger
from lightning_internvl.protocols import DeepTokens, Part


class _DeepStack(Part):
    gives_deep = True
    main: nn.Module
    deep: nn.ModuleList

    def __init__(self, patch_layer: int, deep_layers: Sequence[int], into: Sequence[int] | None) -> None:
        super().__init__()
        self.layers = (patch_layer, *deep_layers)
        self.into = tuple(range(len(deep_layers)) if into is None else into)
        if len(self.into) != len(deep_layers) or len({*self.into}) != len(self.into) or min(self.into, default=0) < 0:
            each = "one block of the decoder for each of deep_layers, counted from 0"
            raise ValueError(f"middleware.into={list(self.into)} must name {each}, which are {list(deep_layers)}")

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.main, *self.deep]


class DeepStackMLP(_DeepStack):
    """Patches of several encoder layers, each through an MLP of its own.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        deep_layers: hidden states of the encoder that feed blocks of the decoder.
        into: the blocks, counted from 0; None: the first ones.
        patch_layer: the hidden state whose patches stand in the text.
        special_tokens: tokens that the encoder puts before its patches, such as CLS (completed from
            the encoder); they are left out.
        depth: linear layers of an MLP.

    Raises:
        ValueError: unless there is one block for each of `deep_layers`.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        deep_layers: Sequence[int],
        into: Sequence[int] | None = None,
        patch_layer: int = -1,
        special_tokens: int = 1,
        depth: int = 2,
    ) -> None:
        super().__init__(patch_layer, deep_layers, into)
        if depth < 1:
            raise ValueError(f"an MLP has 1 or more layers: {depth=}")
        self.skipped = special_tokens
        self.main = projection(encoder_dim, decoder_dim, depth)
        self.deep = nn.ModuleList(projection(encoder_dim, decoder_dim, depth) for _ in deep_layers)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one image of `tokens_in` visual tokens, special ones included."""
        return tokens_in - self.skipped

    def forward(self, feats: list[Tensor]) -> DeepTokens:
        """One (N, P, D) a layer -> (N, T, H) for the text and for each block."""
        first, *others = (states[:, self.skipped :] for states in feats)
        return DeepTokens(self.main(first), [mlp(x) for mlp, x in zip(self.deep, others, strict=True)])


class DeepStackMerger(_DeepStack):
    """Patches of several encoder layers of any resolution, each through a merger of its own. The
    mergers for blocks normalise neighbours together (see `PatchMerger`).

    Args:
        encoder_dim, decoder_dim, factor, patch_layer, norm_eps: of `PatchMerger`.
        deep_layers, into: as in `DeepStackMLP`; hidden state n + 1 is what the encoder's block n,
            counted from 0, gives (`deepstack_visual_indexes` counts blocks).

    Raises:
        ValueError: unless there is one block for each of `deep_layers`.
    """

    reads = "blocks"  # of neighbouring patches, as the tower of Qwen2-VL orders them

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        deep_layers: Sequence[int],
        into: Sequence[int] | None = None,
        factor: int = 2,
        patch_layer: int = -1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(patch_layer, deep_layers, into)
        make = partial(PatchMerger, encoder_dim=encoder_dim, decoder_dim=decoder_dim, factor=factor, norm_eps=norm_eps)
        self.factor = factor
        self.main: PatchMerger = make()
        self.deep = nn.ModuleList(make(joined_norm=True) for _ in deep_layers)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one picture of `tokens_in` patches."""
        return self.main.tokens_out(tokens_in)

    def forward(self, feats: list[Tensor]) -> DeepTokens:
        """As `PatchMerger`, for the text and for each block."""
        first, *others = feats
        return DeepTokens(self.main([first]), [merger([x]) for merger, x in zip(self.deep, others, strict=True)])
