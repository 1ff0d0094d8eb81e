"""Tokens that two tokenizers share, by the text that they stand for: "▁cat" and "Ġcat" are both " cat"."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

LEADING = "▁"  # a space in SentencePiece, which its decoder drops at the beginning of a text
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes of half a character decode to


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of each text that is one token; of several tokens with one text the first. Added
    tokens, and those of bytes that are no text alone, are left out."""
    special, found = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}, dict[str, int]()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if number in special:
            continue
        bare = token.lstrip(LEADING)
        text = " " * (len(token) - len(bare)) + (tokenizer.convert_tokens_to_string([bare]) if bare else "")
        if text and BROKEN not in text:
            found.setdefault(text, number)
    return found


def shared_words(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """The ids of each shared token in one tokenizer and in the other, in the order of the first."""
    theirs = token_texts(other)
    return [(number, theirs[text]) for text, number in token_texts(one).items() if text in theirs]
