"""The tokenizer of the built-in data: one token a word, made from its texts in a moment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_internvl.data.files.published_tokenizers import published_tokenizer
from lightning_internvl.data.scenes.language import chinese_words, vocabulary_texts
from lightning_internvl.hub import local_source, quiet, tokenizer_folder
from lightning_internvl.messages import NO_TOKENIZER

SPECIAL_TOKENS = (
    "<pad>", "<s>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>",
    "<box>", "</box>", "<ref>", "</ref>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip
IMAGE_AND_BOX_TOKENS = SPECIAL_TOKENS[3:10]
# Part of what a model says, so decoding without special tokens keeps them.
KEPT_TOKENS = ("<box>", "</box>", "<ref>", "</ref>")
# Words that prompts and templates add to the texts about scenes.
TEMPLATE_TEXTS = (
    "summarize: English caption: Chinese caption: caption:",
    "English caption", "Chinese caption", "system user assistant", "user", "assistant", "USER: ASSISTANT:",
    " USER: ASSISTANT:",
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
)  # fmt: skip
# A Chinese word of the built-in texts or any other Chinese character; a word with the space before
# it; a number; the middle of a box; any other single character.
PIECE = "|".join(
    [*sorted(chinese_words(), key=lambda word: (-len(word), word)), r"\p{Han}| ?[A-Za-z]+(?:-[A-Za-z]+)*|[0-9]+|\),\(|\s|."]
)

LEADING = "▁"  # a space in SentencePiece, which its decoder drops at the beginning of a text
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes of half a character decode to
SAVED_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def toy_tokenizer(extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Word-level tokenizer with byte fallback: any text round-trips; built-in words are tokens.

    `<pad>`, `<s>` and `</s>` are 0, 1 and 2; none is added by itself. The result depends on the
    texts alone.

    Args:
        extra_tokens: special tokens of a system, behind all others.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [*vocabulary_texts(), *TEMPLATE_TEXTS]
    words = {piece for text in texts for part in _without_special(text) for piece, _ in split.pre_tokenize_str(part)}
    words |= {f"Ġ{word}" for word in words if word.isascii() and word[0].isalpha()}
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(words)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL_TOKENS, *extra_tokens]
    tokenizer.add_tokens(_added_tokens(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _added_tokens(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(t, special=t not in KEPT_TOKENS, normalized=False) for t in tokens]


def _without_special(text: str) -> list[str]:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\x00")
    return [part for part in text.split("\x00") if part]


def _read(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, without running code that lies there."""
    if Path(source).is_dir() and (found := published_tokenizer(Path(source))) is not None:
        return found
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:
        found = None if Path(source).exists() else published_tokenizer(tokenizer_folder(source))
        if found is None:
            raise
        return found


def hf_tokenizer(pretrained: str | None, extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained language model, with the placeholders of pictures and boxes
    added where it lacks them.

    Args:
        pretrained: a hub id, a local folder, a GGUF file or `package:NAME` (see
            `hub.local_source`).
        extra_tokens: special tokens of a system, added likewise.

    Raises:
        ValueError: without an id or a folder.
    """
    if pretrained is None:
        raise ValueError(NO_TOKENIZER["hf_tokenizer"])
    tokenizer = _read(local_source(pretrained))
    wanted = [*IMAGE_AND_BOX_TOKENS, *extra_tokens]
    unknown = (None, tokenizer.unk_token_id)
    lacking = [token for token in wanted if tokenizer.convert_tokens_to_ids(token) in unknown]
    tokenizer.add_tokens(_added_tokens(lacking))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def bert_tokenizer(pretrained: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a BERT for a Q-Former: [DEC], added as the last token, begins what is
    written (LAVIS `init_tokenizer`), [CLS] what is contrasted or matched, and [SEP] ends both.

    Raises:
        ValueError: without an id or a folder.
    """
    if pretrained is None:
        raise ValueError(NO_TOKENIZER["bert_tokenizer"])
    tokenizer = AutoTokenizer.from_pretrained(local_source(pretrained), trust_remote_code=False)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def saved_tokenizer(folder: str | None = None, extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or the one of a hand-off, whose reader says where.

    Args:
        extra_tokens: a placeholder of pictures, where the checkpoint has no word for it.

    Raises:
        ValueError: if the hand-off or the checkpoint holds none, or has gone.
    """
    if folder is None:
        raise ValueError("the tokenizer of this hand-off is missing: its folder `tokenizers` is gone")
    if Path(folder).is_absolute() and not Path(folder).is_dir():
        raise ValueError(f"the tokenizer is read from {folder}, which is not there; put it back")
    place = Path(folder)
    if place.is_dir() and not any(file for kind in SAVED_FILES for file in place.glob(kind)):
        # The library would make one without words
        raise ValueError(f"{folder} has no file of one ({', '.join(SAVED_FILES)})")
    with quiet():
        tokenizer = _read(local_source(folder))
    tokenizer.add_tokens(list(extra_tokens), special_tokens=True)
    return tokenizer


@functools.lru_cache(maxsize=4096)
def _cached_ids(tokenizer: PreTrainedTokenizerBase, size: int, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # Its size, so that tokens added later are seen
    return _cached_ids(tokenizer, len(tokenizer), text)


def stop_options(tokenizer: PreTrainedTokenizerBase, end: str) -> dict[str, Any]:
    """Options of `generate` that end an answer with its mark, one token or some ("###")."""
    if tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id):
        return {"eos_token_id": tokenizer.eos_token_id, "stop_strings": [end], "tokenizer": tokenizer}
    return {"eos_token_id": token_id(tokenizer, end)}


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a special token. Raises ValueError when the tokenizer does not have it as one token."""
    ids = _ids_of(tokenizer, token)
    found = tokenizer.convert_tokens_to_ids(token)
    if len(ids) == 2 and tokenizer.convert_ids_to_tokens(ids[0]) == "▁":
        ids = ids[1:]  # SentencePiece has a space before every text
    if len(ids) != 1 or found != ids[0]:
        advice = "choose another template, or add it to decoder.tokenizer.extra_tokens"
        raise ValueError(f"the tokenizer has no token {token!r}; {advice}")
    return ids[0]


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
    """Tokens that two tokenizers share, by their text ("▁cat" and "Ġcat" are both " cat"): the id of
    each in one and in the other, in the order of the first."""
    theirs = token_texts(other)
    return [(number, theirs[text]) for text, number in token_texts(one).items() if text in theirs]
