"""Conversations to token ids and labels. Text and answers are tokenised apart, so labels are exact by construction."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_internvl.data.templates import IMAGE, ChatTemplate, Message, Segment

IGNORE = -100


@dataclass(frozen=True)
class ImageTokens:
    """Names of the special tokens around and inside the run that stands for one picture; start and end may be None."""

    context: str = "<IMG_CONTEXT>"
    start: str | None = "<img>"
    end: str | None = "</img>"


IMAGE_TOKENS = ImageTokens()


def encode_conversation(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    visual_tokens: int,
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; labels are -100 but on the answers and their end markers.

    Every "<image>" becomes a run of `visual_tokens` context tokens between the start and end tokens. A conversation
    over `max_length` loses whole turns at its end. Raises ValueError naming `sample`, `max_length` and `visual_tokens`
    when the first turn does not fit or a picture would be lost, and naming `sample` for a malformed conversation.
    """
    _check_answers(turns, sample)
    ids, labels = _beginning(template, tokenizer)
    fits = True
    for segments in _rounds(turns, template, tokenizer, sample):
        round_ids, round_labels = _encode_segments(segments, tokenizer, visual_tokens, image_tokens, sample)
        fits = fits and len(ids) + len(round_ids) <= max_length
        if not fits:
            if not any(label != IGNORE for label in labels):
                raise _too_long("its first turn does not fit", sample, max_length, visual_tokens)
            if any(IMAGE in segment.text for segment in segments):
                raise _too_long("a picture would be cut off", sample, max_length, visual_tokens)
            continue
        ids += round_ids
        labels += round_labels
    return ids, labels


def encode_prompt(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    visual_tokens: int,
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
) -> list[int]:
    """Token ids to generate from: the turns end with a user message, and the assistant's turn is left open.

    The ids are exactly those that stand before the answer in `encode_conversation`. Raises ValueError like it, and
    when the prompt is over `max_length` or the last message is not the user's.
    """
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"sample {sample}: a prompt must end with a user message")
    ids, _ = _beginning(template, tokenizer)
    for segments in _rounds(turns, template, tokenizer, sample):
        ids += _encode_segments(segments, tokenizer, visual_tokens, image_tokens, sample)[0]
    if len(ids) > max_length:
        raise _too_long(f"the prompt has {len(ids)} tokens", sample, max_length, visual_tokens)
    return ids


@functools.lru_cache(maxsize=4096)
def _cached_ids(tokenizer: PreTrainedTokenizerBase, size: int, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return _cached_ids(tokenizer, len(tokenizer), text)  # its size, so that tokens added later are seen


@functools.lru_cache(maxsize=16)
def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before every text by itself, as SentencePiece vocabularies do."""
    tokens = tokenizer.tokenize("a")
    return bool(tokens) and tokens[0].startswith("▁")


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that follows other text; a leading space is not doubled where the tokenizer adds its own."""
    if _adds_space(tokenizer) and text.startswith(" "):
        text = text[1:]
    return list(_ids_of(tokenizer, text)) if text else []


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a special token. Raises ValueError when the tokenizer does not have it as one token."""
    ids = _ids_of(tokenizer, token)
    found = tokenizer.convert_tokens_to_ids(token)
    if len(ids) != 1 or found != ids[0]:
        raise ValueError(f"the tokenizer has no token {token!r}; add it as a special token first")
    return ids[0]


def _beginning(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if template.begins_with_bos and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], [IGNORE]
    return [], []


def _rounds(
    turns: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, sample: str
) -> Iterable[list[Segment]]:
    try:
        return template.rounds(turns, tokenizer.eos_token or "")
    except ValueError as error:
        raise ValueError(f"sample {sample}: {error}") from error


def _encode_segments(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    visual_tokens: int,
    image_tokens: ImageTokens,
    sample: str,
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    context = token_id(tokenizer, image_tokens.context)
    for text, is_answer in segments:
        for position, part in enumerate(text.split(IMAGE)):
            if position:
                run = [context] * visual_tokens
                run = [token_id(tokenizer, image_tokens.start), *run] if image_tokens.start else run
                run = [*run, token_id(tokenizer, image_tokens.end)] if image_tokens.end else run
                ids += run
                labels += [IGNORE] * len(run)
            part_ids = continuation_ids(tokenizer, part)
            if context in part_ids:
                raise ValueError(f"sample {sample}: its text contains {image_tokens.context!r}; write {IMAGE!r}")
            ids += part_ids
            labels += part_ids if is_answer else [IGNORE] * len(part_ids)
    return ids, labels


def _check_answers(turns: Sequence[Message], sample: str) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"sample {sample}: the conversation must end with an answer of the assistant")
    for position, message in enumerate(turns):
        if message["role"] == "assistant" and (IMAGE in message["content"] or not message["content"].strip()):
            raise ValueError(f"sample {sample}: answer {position} is empty or contains {IMAGE!r}")


def _too_long(what: str, sample: str, max_length: int, visual_tokens: int) -> ValueError:
    return ValueError(
        f"sample {sample}: {what} within max_length={max_length} with visual_tokens={visual_tokens} a picture; "
        "raise max_length or lower visual_tokens"
    )
