"""What an export was asked to do, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExportOptions:
    """What may be chosen.

    Attributes:
        layout: a module of `checkpoints.adapters`, or "handoff"; None: the one that transformers
            loads, where there is one, else the official one, else "handoff".
        dtype: float32, bfloat16 or float16, of the weights that are written.
        transformers4: a Python whose environment has transformers 4, which reads the folder too.
        readers: whose rules the folder must keep (see `reader_rules`).
        gguf: whether GGUF files are made of the folder, which not every model can be.
        licence: of the card, with the place of its text where it is none of the well-known ones.
    """

    layout: str | None = None
    dtype: str = "float32"
    max_shard_bytes: int = 5 * 10**9
    licence: str | None = None
    licence_link: str | None = None
    transformers4: str | None = None
    gguf: bool = False
    readers: tuple[str, ...] = ()


@dataclass
class ExportReport:
    """What was written and how it was checked."""

    layout: str
    loader: str  # what read the folder back
    tensors: int
    trained: int
    logits: dict[str, float]  # difference of each prompt, relative to the largest logit
    rounding: float  # of the written type, beside the trained weights
    processor: str
    skipped: list[str]
    writes: bool = True  # whether greedy ids were compared too
    adapters: int = 0  # layers with adapters, where these alone were written
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # numbers of a part, and those trained
    base: tuple[str, str | None] = ("", None)  # of adapters: see `adapter.base_of`
    elsewhere: str | None = None  # how another reader found the folder
    files: list[str] = field(default_factory=list)  # written instead of a folder
    rules: list[str] = field(default_factory=list)  # of readers that are not run
    notes: list[str] = field(default_factory=list)  # what else loads the folder, or does not

    @property
    def worst(self) -> float:
        """The largest difference of all prompts."""
        return max(self.logits.values())
