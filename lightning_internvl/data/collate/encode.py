"""Conversations to token ids and labels, exact because text and answers are apart."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.templates import IMAGE, VIDEO, ChatTemplate, Message, Segment
from lightning_internvl.data.tokenizer import _ids_of, token_id


@dataclass(frozen=True)
class ImageTokens:
    """Names of the tokens around and inside a picture's run; start and end may be None.

    `video` stands inside the run of a video; None where there are no videos.
    """

    context: str = "<IMG_CONTEXT>"
    start: str | None = "<img>"
    end: str | None = "</img>"
    video: str | None = None


IMAGE_TOKENS = ImageTokens()
Runs = dict[str, Iterator[list[int]]]


class TooLong(ValueError):
    """A conversation that does not fit; a placeholder is never cut off."""

    kind = "too long"  # under which `Ledger` counts it


def encode_conversation(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    image_lengths: Sequence[int],
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
    video_lengths: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; labels are -100 but on answers and ends.

    The n-th "<image>" becomes a run of `image_lengths[n]` context tokens between the start and end
    tokens, and likewise each "<video>" where `image_tokens` has a token for it. A conversation over
    `max_length` loses whole turns at its end. Raises TooLong (a ValueError) naming `sample`,
    `max_length` and `image_lengths` when the first turn does not fit or a picture would be lost,
    and ValueError naming `sample` for a malformed conversation or one whose marks and pictures
    differ in number.
    """
    _check_answers(turns, sample)
    ids, labels = _first_ids(template, tokenizer)
    runs = _placeholder_runs(turns, tokenizer, image_lengths, video_lengths, image_tokens, sample)
    fits, kept = True, 0
    for segments in _rounds(turns, template, tokenizer, sample):
        round_ids, round_labels = _encode_segments(segments, tokenizer, runs, image_tokens, sample)
        fits = fits and len(ids) + len(round_ids) <= max_length
        if not fits:
            if not kept:
                raise _too_long("its first turn does not fit", sample, max_length, image_lengths)
            if any(mark in segment.text for segment in segments for mark in runs):
                raise _too_long("a picture would be cut off", sample, max_length, image_lengths)
            continue
        ids += round_ids
        labels += round_labels
        kept += 1
    if not any(label != IGNORE_INDEX for label in labels):
        raise _too_long("no answer that is learnt fits", sample, max_length, image_lengths)
    return ids, labels


def certainly_fits(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    image_lengths: Sequence[int],
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
    video_lengths: Sequence[int] = (),
) -> bool:
    """Whether `encode_conversation` takes a conversation whole, without its tokens: because its text
    has no more bytes than `max_length` leaves. False says nothing. Raises ValueError as it does.

    No tokenizer makes more tokens than a text has bytes, but for a space before each piece, and
    Unicode's forms: NFC makes up to three times as many bytes, others are not counted on.
    """
    _check_answers(turns, sample)
    _check_marks(turns, image_lengths, video_lengths, image_tokens, sample)
    segments = [segment for one in _rounds(turns, template, tokenizer, sample) for segment in one]
    text = "".join(segment.text for segment in segments)
    names = (image_tokens.context, image_tokens.video)
    if any(name and name in text for name in names) or not any(segment.is_answer for segment in segments):
        return False
    if text.isascii():
        size = len(text)
    elif _normalizer(tokenizer) in ("NoneType", "NFC"):
        size = 3 * len(text.encode())
    else:
        return False
    pieces = len(segments) + 2 * (len(image_lengths) + len(video_lengths)) + 1
    return size + pieces + sum(image_lengths) + sum(video_lengths) + pieces <= max_length


@functools.lru_cache(maxsize=16)
def _normalizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The kind of the tokenizer's normalizer; unknown for one that does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "unknown" if backend is None else type(backend.normalizer).__name__


def encode_prompt(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    image_lengths: Sequence[int],
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
    video_lengths: Sequence[int] = (),
) -> list[int]:
    """Token ids to generate from: turns end with the user's, the assistant's is left open.

    The ids are exactly those that stand before the answer in `encode_conversation`. Raises
    ValueError like it, and when the prompt is over `max_length` or the last message is not the
    user's.
    """
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"sample {sample}: a prompt must end with a user message")
    ids, _ = _first_ids(template, tokenizer)
    runs = _placeholder_runs(turns, tokenizer, image_lengths, video_lengths, image_tokens, sample)
    for segments in _rounds(turns, template, tokenizer, sample):
        ids += _encode_segments(segments, tokenizer, runs, image_tokens, sample)[0]
    if len(ids) > max_length:
        raise _too_long(f"the prompt has {len(ids)} tokens", sample, max_length, image_lengths)
    return ids


def encode_passage(
    turns: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    image_lengths: Sequence[int],
    max_length: int,
    sample: str,
    image_tokens: ImageTokens = IMAGE_TOKENS,
    video_lengths: Sequence[int] = (),
) -> list[int]:
    """Token ids of one message without a chat format, to be embedded: the token that begins texts, if
    the template has it, what is said and shown, and the token that ends texts.

    A text over `max_length` loses its end, never that token. Raises TooLong where a picture would be
    cut off, and ValueError naming `sample` as `encode_conversation` does.
    """
    (message,) = turns
    first, _ = _first_ids(template, tokenizer)
    runs = _placeholder_runs(turns, tokenizer, image_lengths, video_lengths, image_tokens, sample)
    ids, _ = _encode_segments([Segment(message["content"], False)], tokenizer, runs, image_tokens, sample)
    room = max_length - len(first) - 1
    visual = {token_id(tokenizer, name) for name in (image_tokens.context, image_tokens.video) if name}
    if room < 1 or visual & set(ids[room:]):
        raise _too_long("a picture would be cut off", sample, max_length, image_lengths)
    return [*first, *ids[:room], tokenizer.eos_token_id]


@functools.lru_cache(maxsize=16)
def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before every text, as SentencePiece does."""
    tokens = tokenizer.tokenize("a")
    return bool(tokens) and tokens[0].startswith("▁")


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that follows other text, without the space that a tokenizer adds."""
    if _adds_space(tokenizer) and text.startswith(" "):
        text = text[1:]
    return list(_ids_of(tokenizer, text)) if text else []


def _first_ids(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if template.begins_with_bos and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], [IGNORE_INDEX]
    return [], []


def _rounds(
    turns: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, sample: str
) -> Iterable[list[Segment]]:
    try:
        return template.rounds(turns, tokenizer.eos_token or "")
    except ValueError as error:
        raise ValueError(f"sample {sample}: {error}") from error


def _placeholder_runs(
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    image_lengths: Sequence[int],
    video_lengths: Sequence[int],
    image_tokens: ImageTokens,
    sample: str,
) -> Runs:
    """The tokens that stand for each picture and each video, in order, by their mark."""
    _check_marks(turns, image_lengths, video_lengths, image_tokens, sample)
    names = image_tokens
    start, end = ([token_id(tokenizer, x)] if x else [] for x in (names.start, names.end))
    runs: Runs = {}
    for mark, token, lengths in ((IMAGE, names.context, image_lengths), (VIDEO, names.video, video_lengths)):
        if token is not None:
            context = token_id(tokenizer, token)
            runs[mark] = iter([[*start, *[context] * length, *end] for length in lengths])
    return runs


def _check_marks(
    turns: Sequence[Message],
    image_lengths: Sequence[int],
    video_lengths: Sequence[int],
    names: ImageTokens,
    sample: str,
) -> None:
    """Raise ValueError for marks and pictures that differ in number, and for videos without a
    token."""
    pictures = ("pictures", IMAGE, names.context, image_lengths)
    for kind, mark, token, lengths in (pictures, ("videos", VIDEO, names.video, video_lengths)):
        if token is None and lengths:
            fault = "it has videos, for which this recipe has no token"
            ways = "set data.video_token, or data.chats_collate.video_frames=[8, 32] for a decoder that reads frames as pictures"
            raise ValueError(f"sample {sample}: {fault}; {ways}")
        marks = 0 if token is None else sum(message["content"].count(mark) for message in turns)
        if token is not None and marks != len(lengths):
            raise ValueError(f"sample {sample}: {len(lengths)} {kind} but {marks} {mark!r} marks")


def _encode_segments(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    runs: Runs,
    image_tokens: ImageTokens,
    sample: str,
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    marks = (image_tokens.context, image_tokens.video)
    contexts = {token_id(tokenizer, token): token for token in marks if token}
    for text, is_answer in segments:
        for part in re.split("|".join(f"({re.escape(mark)})" for mark in runs), text):
            if not part:
                continue
            if part in runs:
                run = next(runs[part])
                ids += run
                labels += [IGNORE_INDEX] * len(run)
                continue
            part_ids = continuation_ids(tokenizer, part)
            if found := contexts.keys() & set(part_ids):
                name = contexts[found.pop()]
                usual = " or ".join(map(repr, runs))
                raise ValueError(f"sample {sample}: its text contains {name!r}; write {usual}")
            ids += part_ids
            labels += part_ids if is_answer else [IGNORE_INDEX] * len(part_ids)
    return ids, labels


def _check_answers(turns: Sequence[Message], sample: str) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"sample {sample}: the conversation must end with an answer of the assistant")
    for position, message in enumerate(turns):
        if message["role"] == "assistant" and (IMAGE in message["content"] or not message["content"].strip()):
            raise ValueError(f"sample {sample}: answer {position} is empty or contains {IMAGE!r}")


def _too_long(what: str, sample: str, max_length: int, image_lengths: Sequence[int]) -> TooLong:
    tokens = " + ".join(map(str, image_lengths)) or "no"
    fault = f"{what} within max_length={max_length}"
    return TooLong(f"sample {sample}: {fault}; its pictures have {tokens} tokens")
