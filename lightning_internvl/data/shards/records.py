"""What a record of a shard says: a picture with its caption, or a conversation about pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lightning_internvl.data.bad_samples import BadSample, writable
from lightning_internvl.data.files.conversations import CAPTIONS, check_length
from lightning_internvl.data.files.images import IMAGE_SUFFIXES
from lightning_internvl.data.files.picture_sources import IMAGES
from lightning_internvl.data.files.record_fields import Fields, each_once, is_empty
from lightning_internvl.data.files.record_formats import format_of

PICTURES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
TEXTS = ("txt", *CAPTIONS)
LANGUAGE = 40  # characters of the name of a language
# The entry of a tar's record whose files do not tell which belong together; no extension has a slash
DOUBLED = "/doubled"
DIGITS = re.compile(r"(\d+)")


def pair_of(record: Mapping[str, Any], image: str | None = None, caption: str | None = None) -> dict[str, Any]:
    """{"image": bytes of a file, "caption": text, "key"[, "language"]} of a record.

    The caption is the entry "txt", "caption" or "text", or one of this name in the entry "json".

    Args:
        image, caption: the extension or column, where it has another name.

    Raises:
        BadSample: saying what is missing, or cannot be read.
    """
    key = str(record["key"])
    _check_doubled(record)
    said = _json(record)
    names = (caption,) if caption else TEXTS
    found_texts = (source.get(name) for source in (record, said) for name in names)
    text = next((one for one in found_texts if one is not None), None)
    if text is None:
        raise BadSample(f"it has no caption: none of {', '.join(names)} among {_names(record, said)}", "missing caption", key)
    found = {"image": _picture(record, said, image), "caption": _text(text, key), "key": key}
    language = said.get("language") or record.get("language")
    return {**found, "language": writable(language)[:LANGUAGE]} if isinstance(language, str) else found


def chats_of(record: Mapping[str, Any], image: str | None = None, caption: str | None = None) -> dict[str, Any]:
    """A record as `conversations.read_entry` reads it: a conversation with its pictures as bytes,
    or a picture and its caption.

    A conversation is a record, or its entry "json", in one of the formats of `record_formats`. In a
    tar file its pictures are the record's pictures in the order of the numbers in their extensions
    (0.jpg, 1.jpg), whatever the conversation calls them.

    Raises:
        BadSample: as `pair_of`.
    """
    _check_doubled(record)
    said = _json(record)
    source = next((one for one in map(_filled, (record, said)) if format_of(Fields(one)) is not None), None)
    if source is None:
        return pair_of(record, image, caption)
    files = sorted((name for name in record if name.rpartition(".")[2] in PICTURES), key=_natural_order)
    chat = {name: value for name, value in source.items() if name not in (*files, image) and not (files and name in IMAGES)}
    if image is not None and record.get(image):
        chat["images"] = record[image]
    elif files:
        chat["images"] = [record[name] for name in files]
    return {**chat, "key": str(record["key"])}


def _picture(record: Mapping[str, Any], said: Mapping[str, Any], name: str | None) -> bytes:
    key = str(record["key"])
    names = (name,) if name else (*PICTURES, *IMAGES)
    if len(several := [one for one in names if one in PICTURES and record.get(one)]) > 1:
        what = f"{len(several)} pictures for one caption, {', '.join(several)}"
        raise BadSample(f"it has {what}; say which counts with data.image={several[0]}", "several images", key)
    found = next((record[one] for one in names if record.get(one)), None)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, Mapping):  # of a Hugging Face data set
        found = found.get("bytes")
    if isinstance(found, bytes):
        return found
    what = f"none of {', '.join(names)} among {_names(record, said)}"
    if found:
        what = f"{found!r:.100} is not the bytes of a file"
    raise BadSample(f"it has no picture: {what}", "missing image", key)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str | bytes):
        raise BadSample(f"its caption is no text, but {value!r:.100}", "broken caption", key)
    check_length(value)
    try:
        text = (value.decode("utf-8") if isinstance(value, bytes) else value).removeprefix("\ufeff").strip()
        text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadSample(f"its caption is not a text in UTF-8: {error.reason}", "broken caption", key) from error
    if "\0" in text:
        raise BadSample(f"its caption holds zeros, as UTF-16 read as UTF-8 does: {text!r:.100}", "broken caption", key)
    if not text:
        raise BadSample("its caption is empty", "empty caption", key)
    check_length(text)
    return text


def _json(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry "json", read; empty where there is none."""
    given = record.get("json")
    if given is None:
        return {}
    try:
        text = given.removeprefix("\ufeff") if isinstance(given, str) else given
        found = json.loads(text, object_pairs_hook=each_once) if isinstance(text, bytes | str) else text
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its json cannot be read: {error}", "broken line", str(record["key"])) from error
    if not isinstance(found, Mapping):
        raise BadSample(f"its json is no mapping, but a {type(found).__name__}", "broken line", str(record["key"]))
    return found


def _filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the columns of a table that say nothing of it."""
    return {name: value for name, value in record.items() if not is_empty(value)}


def _check_doubled(record: Mapping[str, Any]) -> None:
    """Raises BadSample for files of one name that do not tell which belong together."""
    if files := record.get(DOUBLED):
        reason = f"files of one name come again in another order ({files}), so which belong together is not known"
        raise BadSample(reason, "doubled files", str(record["key"]))


def _names(record: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    names = [name for name in record if name != "key"]
    return ", ".join([*names, *(f"json.{name}" for name in said)][:20]) or "nothing"


def _natural_order(name: str) -> list[Any]:
    """Names with numbers in the order of the numbers."""
    return [int(part) if part.isdigit() else part for part in DIGITS.split(name)]
