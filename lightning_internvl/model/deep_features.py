"""Visual features for blocks of the decoder, added to its states where visual tokens stand: DeepStack
(Meng et al. 2024, section 3.2; Qwen3-VL, official `modeling_qwen3_vl.py`, `_deepstack_process`).

Hooks add them behind the blocks, whatever the decoder is, so that its class and names stay. They are
there from the start and do nothing without features: blocks that are compiled keep the hooks they had.

Letters: B rows, L text length, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_internvl.config import fit


class DeepFeatures:
    """What the blocks of a decoder are fed by its middleware; nothing where that has no `into`.

    Raises:
        ValueError: for a decoder that cannot be fed, or has no such block.
    """

    def __init__(self, middleware: nn.Module | None, decoder: nn.Module | None) -> None:
        into: Sequence[int] = getattr(middleware, "into", ())
        self.hooks = [_Add() for _ in into] if decoder is not None else []
        if decoder is None or not into:
            return
        names = type(middleware).__name__, type(decoder).__name__
        if not fit.takes_deep(getattr(decoder, "feeds_blocks", False), getattr(decoder, "inputs", ())):
            raise ValueError(fit.unfed_blocks(*names))
        blocks = decoder.sharding_units()
        for fault in fit.block_faults(names[0], into, len(blocks)):
            raise ValueError(fault)
        for number, hook in zip(into, self.hooks, strict=True):
            blocks[number].register_forward_hook(hook)

    @contextmanager
    def shown(self, features: Sequence[Tensor], once: bool = False) -> Iterator[None]:
        """Add features (B, L, H), zero where no visual tokens stand, one for each fed block; none:
        nothing is added.

        Args:
            once: to the first states that a block makes, those of the prompt.
        """
        for hook, own in zip(self.hooks, features, strict=False):
            hook.features, hook.once = own, once
        try:
            yield
        finally:
            for hook in self.hooks:
                hook.features = None


class _Add:
    """The hook of one block: an object, which copies of the model copy."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.once = False

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        features = self.features
        if features is None:
            return output
        if self.once:
            self.features = None
        states = output if isinstance(output, Tensor) else output[0]
        if len(states) != len(features):  # beams of each row
            features = features.repeat_interleave(len(states) // len(features), dim=0)
        states = states + features.to(states.dtype)
        return states if isinstance(output, Tensor) else (states, *output[1:])
