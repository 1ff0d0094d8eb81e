"""Work on many rows a few at a time: what autograd keeps does not grow with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_internvl.messages import check_number


def number_of_chunks(rows: int, chunk: int | None) -> int:
    """Pieces of at most `chunk` rows; one where it is None."""
    return 1 if chunk is None else max(1, -(-rows // chunk))


def checkpointed_chunks(
    function: Callable[..., Any], pieces: int, *rows: Tensor, draws: bool = False, keep_last: bool = False
) -> list[Any]:
    """What `function` makes of `pieces` equal parts of the rows (some a row shorter).

    Of each part autograd keeps the rows and the result alone; the rest is computed again when its
    gradient is asked for, and let go before the next part's turn. What `function` reads beside the
    rows may need gradients too: parameters get the sum over all parts once, as after one large
    batch, so that gradients are sent once under data-parallel training.

    Args:
        draws: whether `function` draws random numbers; they are then the same both times.
        keep_last: compute the last part once and keep all of it, since its gradient is the first to
            be asked for.
    """
    parts = list(zip(*(x.tensor_split(pieces) for x in rows), strict=True))
    return checkpointed(function, parts, draws=draws, keep_last=keep_last)


def checkpointed(
    function: Callable[..., Any], parts: Sequence[tuple[Any, ...]], *, draws: bool = False, keep_last: bool = False
) -> list[Any]:
    """The same for parts that are given, each the arguments of one call: tensors, or batches of some."""
    # a plan replays blocks that it knows, which cannot be computed again; it counts all parts as
    # kept
    if any(leaf.is_meta for leaf in tree_leaves(list(parts)) if isinstance(leaf, Tensor)):
        return [function(*part) for part in parts]
    again, last = (parts[:-1], parts[-1:]) if keep_last else (parts, ())
    found = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=draws) for part in again]
    return found + [function(*part) for part in last]


def check_chunk(name: str, chunk: int | None) -> None:
    """Refuse a number of rows that is none.

    Raises:
        ValueError: naming the setting and its value.
    """
    if chunk is not None:
        check_number(name, chunk, above=0, whole=True, note=", or null for all rows at once")
