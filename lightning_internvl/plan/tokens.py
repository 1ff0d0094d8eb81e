"""A tokenizer of a given size that knows no words: a plan needs the sizes of its tables."""

from __future__ import annotations

from typing import Any


class NoWords:
    """Stands in where a tokenizer would have to be downloaded.

    Args:
        size: ids, as written in the configuration of the part that reads them.
    """

    bos_token, eos_token, pad_token = "<s>", "</s>", "</s>"
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

    def __init__(self, size: int) -> None:
        self.size = size
        self.special: dict[str, int] = {}

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of a special token, from the end of the table."""
        return self.special.setdefault(token, self.size - 1 - len(self.special))

    def encode(self, text: str, **options: Any) -> list[int]:
        """Any text is one token."""
        return [self.convert_tokens_to_ids(text)]

    def tokenize(self, text: str) -> list[str]:
        """Any text is one token."""
        return [text]


def without_words(part: dict[str, Any]) -> dict[str, Any]:
    """A part's configuration with a stand-in for its tokenizer, where its number of ids is written.

    A part that takes its size from its tokenizer keeps that.
    """
    size = part.get("vocab_size") or (part.get("config") or {}).get("vocab_size")
    if not part.get("tokenizer") or not size:
        return part
    return part | {"tokenizer": {"_target_": f"{__name__}.{NoWords.__name__}", "size": size}}
