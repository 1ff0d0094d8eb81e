"""What reaches the page over HTTP: bodies of a bounded size, uploads that fit on the disk, a name for each visitor."""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import HTTPConnection

from lightning_internvl.chat.limits import MB, Holding, OverLimit, Pool
from lightning_internvl.chat.settings import Limits

KEPT = 3600  # seconds that an upload is kept: the page shows it in the conversation
COOKIE = "visitor"
LEAST = 64 * 1024  # bytes that a file counts at least, because many small ones fill a disk, too
FORM = 2**16  # bytes around the files of an upload
UNUSED = ("/process_recording", "/component_server", "/vibe-")  # addresses of Gradio that write files, and no page of ours asks

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def visitor_of(connection: HTTPConnection) -> str:
    """Who asks: the name that the page gave a browser, else the address."""
    return connection.cookies.get(COOKIE, "")[:64] or (connection.client.host if connection.client else "")


class Guard:
    """ASGI middleware around the page's application, which refuses with a sentence.

    Args:
        folder: where Gradio puts uploads, and pictures that it shows.
    """

    def __init__(self, app: App, limits: Limits, folder: Path) -> None:
        self.app, self.limits, self.uploads = app, limits, Uploads(limits, folder)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection, path = HTTPConnection(scope), str(scope["path"]).rstrip("/")

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and COOKIE not in connection.cookies:
                cookie = f"{COOKIE}={secrets.token_hex(16)}; Path=/; HttpOnly; SameSite=Lax"
                message["headers"] = [*message.get("headers", ()), (b"set-cookie", cookie.encode())]
            await send(message)

        try:
            length = self._length(connection, path)
            if scope["method"] == "POST" and path.endswith("/upload"):
                await self._upload(scope, receive, named, length)
            else:
                await self.app(scope, receive, named)
        except OverLimit as error:
            await _refuse(error, named, as_json="/queue/" in path)

    def _length(self, connection: HTTPConnection, path: str) -> int:
        """The bytes of a body; raises OverLimit for too many, or where nobody says how many."""
        limits = self.limits
        if any(name in path for name in UNUSED):
            raise OverLimit("this page does not use that address", 404)
        if "transfer-encoding" in connection.headers:
            raise OverLimit("a request has to say how long it is (Content-Length)", 411)
        length = int(connection.headers.get("content-length", "0"))
        most, setting = MB + 8 * limits.max_characters, f"max_characters={limits.max_characters}"
        if path.endswith("/upload"):
            most = int(max(1, limits.max_pictures) * limits.max_upload_mb * MB) + FORM
            setting = f"max_pictures={limits.max_pictures} of max_upload_mb={limits.max_upload_mb:g}"
        if length > most:
            raise OverLimit(f"{length / MB:.1f} MB are more than {setting} allow")
        return length

    async def _upload(self, scope: Message, receive: Receive, send: Send, length: int) -> None:
        held, status = await self.uploads.coming(visitor_of(HTTPConnection(scope)), length), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self.uploads.came(held, refused=status >= 400)


class Uploads:
    """What lies on the disk, of each visitor and in all, and what is on its way there."""

    def __init__(self, limits: Limits, folder: Path) -> None:
        self.folder, self.total, self.setting = folder, limits.max_uploads_mb * MB, f"max_uploads_mb={limits.max_uploads_mb:g}"
        advice = f"they are deleted after {KEPT // 60} minutes"
        self.pool = Pool("uploads", self.setting, self.total, limits.max_share, advice)
        self.past: deque[tuple[float, Holding]] = deque()
        self.arriving = 0.0

    async def coming(self, visitor: str, size: int) -> Holding:
        """Count an upload that arrives. Raises OverLimit where it does not fit."""
        while self.past and self.past[0][0] < time.time() - KEPT:
            self.past.popleft()[1].close()
        held = Holding(self.pool, visitor)
        held.take(size)
        self.arriving += size
        if await anyio.to_thread.run_sync(self._on_disk) + self.arriving > self.total:
            self.came(held, refused=True)
            raise OverLimit(f"uploads of all visitors fill {self.setting}; try again later", 503)
        return held

    def came(self, held: Holding, refused: bool) -> None:
        """An upload has arrived, or broke off; one that was `refused` left nothing."""
        self.arriving -= held.amount
        if refused:
            held.close()
        else:
            self.past.append((time.time(), held))

    def _on_disk(self) -> int:
        """Bytes of all files. What broke off long ago is deleted; Gradio forgets it."""
        found = 0
        for path in self.folder.rglob("*"):
            try:
                about = path.stat()
                if path.is_file() and path.parent == self.folder and about.st_mtime < time.time() - KEPT:
                    path.unlink()
                elif path.is_file():
                    found += max(about.st_size, LEAST)
            except FileNotFoundError:  # deleted meanwhile
                continue
        return found


async def _refuse(error: OverLimit, send: Send, as_json: bool) -> None:
    kind = "application/json" if as_json else "text/plain; charset=utf-8"
    body = (json.dumps({"detail": str(error)}) if as_json else str(error)).encode()
    await send({"type": "http.response.start", "status": error.code, "headers": [(b"content-type", kind.encode())]})
    await send({"type": "http.response.body", "body": body})
