"""The perceive sampler of InternLM-XComposer: a Q-Former whose tokens stand between two learned
flags (Zhang et al. 2023, section 3.1; official `modeling_InternLM_XComposer.py`).

Letters: N images, P visual tokens, D encoder width, Q queries, H decoder width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_internvl.middleware.qformer import QFormer


class PerceiveSampler(QFormer):
    """A flag, the projected queries, another flag: Q + 2 tokens an image. The flags start at zero.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        num_queries: Q (published: 64).
        options: sizes of the `QFormer`, which reads no text here.
    """

    roles: ClassVar[dict[str, tuple[str, ...]]] = QFormer.roles | {"connector": ("proj", "flag_*")}

    def __init__(self, *, encoder_dim: int, decoder_dim: int, num_queries: int = 64, **options: Any) -> None:
        super().__init__(encoder_dim=encoder_dim, decoder_dim=decoder_dim, num_queries=num_queries, text="none", **options)
        self.flag_start, self.flag_end = (nn.Parameter(torch.zeros(1, 1, decoder_dim)) for _ in range(2))

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens of one image, whatever the number of visual tokens."""
        return self.num_queries + 2

    # without instructions, which are text
    def forward(self, feats: list[Tensor]) -> Tensor:  # type: ignore[override]
        """[(N, P, D)] -> (N, Q + 2, H)"""
        tokens = super().forward(feats)
        flags = (flag.expand(len(tokens), -1, -1).to(tokens.dtype) for flag in (self.flag_start, self.flag_end))
        return torch.cat([next(flags), tokens, next(flags)], dim=1)
