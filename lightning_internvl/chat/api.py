"""What `chat.py ui=api` serves: chat completions and embeddings in the form of OpenAI's API.

Source: https://platform.openai.com/docs/api-reference (chat/create, chat/streaming, embeddings/create, models).
"""

from __future__ import annotations

import base64
import functools
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any

import anyio
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lightning_internvl.chat.completions import Completion, Piece
from lightning_internvl.chat.limits import MB, Holding, OverLimit, Turns, check_conversation, listen, share_heaps, told_of_access
from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.requests import (
    ApiError,
    Asked,
    ChatRequest,
    EmbeddingRequest,
    ImagePart,
    TextPart,
    parsed,
    picture_of,
)  # fmt: skip
from lightning_internvl.chat.session import Sampling, end_answers
from lightning_internvl.chat.settings import LOOPBACK, SIGNALS, ChatSettings
from lightning_internvl.data.files.images import read_image
from lightning_internvl.distributed.signals import WATCH
from lightning_internvl.inference.embeddings import text_lengths

COPIES = 2  # of a body, while it is read: as it came, and its values
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def serve_api(loaded: Loaded, settings: ChatSettings, sampling: Sampling) -> None:
    """Answer until Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        ConfigError: for a port that is taken.
    """
    share_heaps()
    with WATCH.installed(*SIGNALS), listen(settings.host, settings.port) as listening:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        api = Api(loaded, settings, sampling)
        print(f"{api.id}: http://{host}:{listening.getsockname()[1]}/v1 (Ctrl-C ends)")
        if line := told_of_access(settings.host, settings.is_local, settings.password):
            print(line)
        config = uvicorn.Config(api.app(), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            return
        finally:
            end_answers()


class Api:
    """The routes and what they answer.

    Attributes:
        id: the name of the model, which requests give.
        turns: who is answered.
    """

    def __init__(self, loaded: Loaded, settings: ChatSettings, sampling: Sampling) -> None:
        self.loaded, self.settings, self.sampling = loaded, settings, sampling
        self.id = re.sub(r"[^\w.]+", "-", loaded.name).strip("-")
        self.turns, self.begun = Turns(settings), int(time.time())

    def app(self) -> Starlette:
        """The application, not yet served."""
        routes = [
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.models)),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self.embeddings), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _of_route, Exception: _unforeseen})

    def _guarded(self, handler: Handler) -> Handler:
        """A handler for those who know the password, whose faults are told in OpenAI's form."""

        @functools.wraps(handler)
        async def guarded(request: Request) -> Response:
            try:
                self._check_access(request)
                return await handler(request)
            except ApiError as error:
                return _told(error)
            except OverLimit as error:
                return _told(ApiError(error.code, str(error)))

        return guarded

    def _check_access(self, request: Request) -> None:
        """Raise ApiError for a page of another name that a browser shows, and without the password."""
        if self.settings.is_local and (name := _host(request)) not in LOOPBACK:
            raise ApiError(403, f"this server answers as {' or '.join(LOOPBACK)}, not as {name!r}")
        if self.settings.password is None:
            return
        kind, _, word = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(word.strip().encode("latin-1"), self.settings.password.encode()):
            raise ApiError(401, "the password is missing or wrong: it is sent as the API key (Authorization: Bearer PASSWORD)")

    # --- models ---------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The one model, in a list or by its name."""
        model = {"id": self.id, "object": "model", "created": self.begun, "owned_by": "lightning_internvl"}
        if (name := request.path_params.get("name")) is None:
            return _json({"object": "list", "data": [model]})
        self._check_model(name)
        return _json(model)

    def _check_model(self, name: str) -> None:
        if name != self.id:
            raise ApiError(404, f"there is no model {name!r}; this server has {self.id!r}", "model", "model_not_found")

    # --- bodies ---------------------------------------------------------------------------------

    async def _asked(self, request: Request, held: Holding, kind: type[Asked]) -> Asked:
        """What a request says; the memory of its body is counted while it is held."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(400, "the body must be JSON: Content-Type: application/json")
        limits = self.settings
        most = int(limits.max_pictures * limits.max_upload_mb * MB * 4 / 3) + 8 * limits.max_characters + MB
        length = request.headers.get("content-length", "0")
        _check_size(int(length) if length.isdecimal() else 0, most)
        body = bytearray()
        async for chunk in request.stream():
            _check_size(len(body) + len(chunk), most)
            held.take(COPIES * len(chunk))
            body += chunk
        asked = parsed(body, kind)
        self._check_model(asked.model)
        held.leave(len(body))
        return asked

    def _check_parts(self, parts: list[TextPart | ImagePart], messages: int = 0) -> None:
        """Raise OverLimit for too much, ApiError for a text that no tokenizer reads."""
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        check_conversation(self.settings, pictures=len(parts) - len(texts), messages=messages, characters=sum(map(len, texts)))
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"a text is no Unicode: {error.reason}") from error

    # --- chat completions -----------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """The answer to a conversation, whole or as events."""
        async with AsyncExitStack() as stack:
            visitor = _visitor(request)
            held = stack.enter_context(Holding(self.turns.memory, visitor))
            asked = await self._asked(request, held, ChatRequest)
            completion = Completion(asked, self.loaded, self.id, self.settings, self.sampling)
            self._check_parts([part for one in asked.messages for part in one.content], len(asked.messages))
            await stack.enter_async_context(self.turns.turn(visitor))
            if await request.is_disconnected():
                return Response(status_code=499)
            pieces = await stack.enter_async_context(aclosing(completion.pieces()))
            try:
                first = await anext(pieces)
                if not asked.stream:
                    return await _whole(completion, request, first, pieces)
            except OverLimit:
                raise
            except ValueError as error:  # of the conversation
                code = "context_length_exceeded" if "longer than" in str(error) else None
                raise ApiError(400, str(error), "messages", code) from error
            return _Events(completion.events(first, pieces), stack.pop_all())

    # --- embeddings -----------------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts and pictures, of length 1."""
        visitor = _visitor(request)
        with Holding(self.turns.memory, visitor) as held:
            asked = await self._asked(request, held, EmbeddingRequest)
            if self.loaded.retriever is None:
                raise ApiError(400, f"{self.id} does not compare pictures and texts: it has no embeddings", "model")
            self._check_parts(asked.input)
            async with self.turns.turn(visitor):
                if await request.is_disconnected():
                    return Response(status_code=499)
                try:
                    vectors, tokens = await anyio.to_thread.run_sync(self._vectors, asked.input)
                except OverLimit:
                    raise
                except ValueError as error:
                    raise ApiError(400, str(error), "input") from error
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, asked.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "model": self.id, "data": data, "usage": usage})

    def _vectors(self, parts: list[TextPart | ImagePart]) -> tuple[list[np.ndarray], int]:
        """A vector for each part, and how many tokens the texts have."""
        assert self.loaded.retriever is not None
        retriever, texts = self.loaded.retriever, [part.text for part in parts if isinstance(part, TextPart)]
        lengths = text_lengths(retriever.pairs, texts)
        if texts and max(lengths) > retriever.pairs.max_length:
            raise ValueError(f"a text has {max(lengths)} tokens, more than the {retriever.pairs.max_length} that the model reads")
        of_texts = iter(retriever.texts(texts) if texts else ())
        if retriever.late:
            raise ValueError("this model embeds by late interaction, a vector a token; it has no embedding of a whole text")
        vectors = []
        for part in parts:
            if isinstance(part, TextPart):
                vectors.append(next(of_texts).cpu().numpy())
                continue
            (queries,) = retriever.images([read_image(picture_of(part, self.settings, self.settings.trust))])
            if len(queries) > 1:
                raise ValueError(f"this model describes a picture by {len(queries)} vectors; only texts have embeddings here")
            vectors.append(queries[0].cpu().numpy())
        return vectors, sum(lengths)


async def _whole(completion: Completion, request: Request, piece: Piece, others: AsyncIterator[Piece]) -> Response:
    """All answers in one body; none where nobody waits for them any more."""
    ended = [piece] if piece.finish else []
    async for piece in others:
        ended += [piece] if piece.finish else []
        if await request.is_disconnected():
            return Response(status_code=499)
    return _json(completion.whole(ended))


class _Events(StreamingResponse):
    """Server-sent events; what was opened for them is closed, also where nobody listens any more."""

    def __init__(self, events: AsyncIterator[str], opened: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.opened = opened

    async def __call__(self, *connection: Any) -> None:
        """Send them."""
        async with self.opened:
            await super().__call__(*connection)


def _json(content: Any, status: int = 200, **headers: str) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _told(error: ApiError) -> Response:
    wait = {"Retry-After": "5"} if error.status in (429, 503) else {}
    return _json(error.content(), error.status, **wait)


async def _of_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _told(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _unforeseen(request: Request, error: Exception) -> Response:
    return _told(ApiError(500, "the request could not be answered; the server's terminal says why"))


def _encoded(vector: np.ndarray, form: str) -> list[float] | str:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise OverLimit(f"the request is larger than {most // MB} MB, which max_pictures, max_upload_mb and max_characters allow")


def _visitor(request: Request) -> str:
    return request.client.host if request.client else ""


def _host(request: Request) -> str:
    """The name by which a request calls this machine."""
    host = request.headers.get("host", "")
    return host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0].lower()
