"""What a request to the API may say, and the errors that answer it, in the form of OpenAI's API.

Source: https://platform.openai.com/docs/api-reference (chat/create, embeddings/create, errors).
"""

from __future__ import annotations

import base64
import binascii
import json
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lightning_internvl.chat.limits import MB, OverLimit
from lightning_internvl.chat.settings import Limits
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.files import check_no_device
from lightning_internvl.messages import did_you_mean

SECONDS = 20  # that a server of pictures may take
# Parameters of OpenAI's that are not followed here, with the values that ask for nothing.
VAIN: dict[str, tuple[Any, ...]] = {
    "audio": (), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "logit_bias": ({},),
    "logprobs": (False,), "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "presence_penalty": (0,), "reasoning_effort": (), "response_format": ({"type": "text"},), "service_tier": ("auto", "default"),
    "store": (False,), "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "verbosity": (),
    "web_search_options": (), "dimensions": (),
}  # fmt: skip
# Those that change no answer there either.
NOTES = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded", 500: "internal_error", 503: "overloaded"}


class ApiError(Exception):
    """An error of OpenAI's API: an HTTP status, a message, the parameter that is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or CODES.get(status)

    def content(self) -> dict[str, Any]:
        """The body that tells it."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(_Strict):
    """Where a picture is."""

    url: str
    detail: Literal["auto"] = "auto"


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]

    @property
    def marked(self) -> list[str]:
        """Texts, and the mark of a picture in the place of each."""
        return [part.text if isinstance(part, TextPart) else IMAGE for part in self.content]


class StreamOptions(_Strict):
    """What else a stream tells."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """A conversation, and how it is to be answered; None: as the settings of the server say."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=8)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**62)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The words that end an answer."""
        return [word for word in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if word]


class EmbeddingRequest(_Strict):
    """Texts and pictures to embed."""

    model: str
    input: list[Part] = Field(min_length=1, max_length=2048)
    encoding_format: Literal["float", "base64"] = "float"


Asked = TypeVar("Asked", ChatRequest, EmbeddingRequest)


def parsed(body: bytearray, kind: type[Asked]) -> Asked:
    """A request of its kind. Raises ApiError for one that is not followed, naming the parameter."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    fields: Collection[str] = kind.model_fields
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, value in given.items():
        if name in VAIN and value is not None and value not in VAIN[name]:
            raise ApiError(
                400, f"{name}={_short(value)} is not offered by this server; leave it out", name, "unsupported_parameter"
            )
        if name not in (*VAIN, *NOTES, *fields):
            raise ApiError(400, f"there is no parameter {name!r}; {did_you_mean(name, fields)}", name, "unknown_parameter")
    known = {name: value for name, value in given.items() if name in fields and value is not None}
    if isinstance(messages := known.get("messages"), list):
        known["messages"] = [_plain(one) if isinstance(one, dict) else one for one in messages]
    if "input" in known:
        known["input"] = _in_parts(known["input"])
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{place}: {first['msg']}", place, "invalid_value") from error


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its empty fields, with which an answer is sent back, and its content in parts."""
    found = {name: value for name, value in message.items() if value not in (None, []) or name == "content"}
    return {**found, "content": _in_parts(found.get("content"))}


def _in_parts(content: Any) -> Any:
    """A text or a list of texts as parts; anything else as it is."""
    items = [content] if isinstance(content, str) else content
    return [{"type": "text", "text": one} if isinstance(one, str) else one for one in items] if isinstance(items, list) else items


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def picture_of(part: ImagePart, limits: Limits, trusted: Sequence[str]) -> bytes:
    """The file of a picture, not looked at.

    Args:
        trusted: origins (https://HOST) and folders (file:///FOLDER) that pictures may come from.

    Raises:
        ApiError: for a URL that is neither data nor trusted, or cannot be read.
        OverLimit: for too large a file.
    """
    try:
        file = _file_at(part.image_url.url, int(limits.max_upload_mb * MB), trusted)
    except OSError as error:
        raise ApiError(400, f"the picture could not be fetched: {error}", "image_url.url") from error
    if len(file) > limits.max_upload_mb * MB:
        raise OverLimit(f"a picture has more than max_upload_mb={limits.max_upload_mb:g}; send a smaller file")
    return file


def _file_at(url: str, most: int, trusted: Sequence[str]) -> bytes:
    """The first `most` + 1 bytes of a file."""
    if url.startswith("data:"):
        head, comma, text = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ApiError(400, "a picture's URL must be data:image/png;base64,... or another type in base64", "image_url.url")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"the data of a picture is no base64: {error}", "image_url.url") from error
    place = urlsplit(url)
    if place.scheme == "file" and not place.netloc:
        path = Path(unquote(place.path)).resolve()
        if not any(
            path.is_relative_to(Path(name[len("file://") :]).resolve()) for name in trusted if name.startswith("file:///")
        ):
            raise _untrusted(f"file://{path.parent}")
        check_no_device(path)
        with path.open("rb") as file:
            return file.read(most + 1)
    origin = f"{place.scheme}://{place.netloc}"
    if place.scheme not in ("http", "https") or origin not in trusted:
        raise _untrusted(origin)
    with urllib.request.build_opener(_NoRedirect).open(url, timeout=SECONDS) as answer:
        return answer.read(most + 1)


def _untrusted(place: str) -> ApiError:
    allowed = "a picture is sent as a data: URL (data:image/png;base64,...)"
    known = place.startswith(("file:///", "http://", "https://"))
    more = f"; who runs this server may allow others: trust=[{place}]" if known else ""
    return ApiError(400, f"{allowed}; files and addresses are not read{more}", "image_url.url", "invalid_image_url")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server that is trusted sends nobody to another one."""

    def redirect_request(self, *arguments: Any) -> None:
        """Refuse."""


def without_none(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given."""
    return {name: value for name, value in given.items() if value is not None}
