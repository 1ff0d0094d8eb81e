"""What visitors of the page may take, without a server: conversations in their limits, and the guard before the page."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs what Gradio brings: pip install -r requirements-chat.txt")
import httpx
from chat_toys import chat_settings, picture, talker
from PIL import Image

from lightning_internvl.chat import uploads
from lightning_internvl.chat.limits import Holding, OverLimit, Pool
from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.chat.settings import HIDDEN, PASSWORD, hide_password, with_password
from lightning_internvl.chat.talks import Talk, Talks

MODEL, CHATS = talker()
SHORT = Sampling(max_new_tokens=3)


def talks(**limits: Any) -> Talks:
    return Talks(lambda: Session(MODEL, CHATS), chat_settings(**limits))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Pictures of about 7 KB."""
    for number in range(4):
        Image.fromarray(picture(number, 48, 48)).save(tmp_path / f"{number}.png")
    return [str(path) for path in sorted(tmp_path.glob("*.png"))]


async def answered(talks: Talks, talk: Talk, *files: str, question: str = "what?") -> str:
    return [text async for text in talks.answer(talk, question, list(files), SHORT)][-1]


def test_a_conversation_has_its_limits_and_a_refused_question_changes_nothing(files: list[str]) -> None:
    async def use() -> None:
        some = talks(max_pictures=2, max_messages=3, max_characters=60)
        talk = some.new("me", "page")
        with pytest.raises(OverLimit, match="3 pictures, more than max_pictures=2; begin a new one"):
            await answered(some, talk, *files[:3])
        with pytest.raises(OverLimit, match="61 characters, more than max_characters=60"):
            await answered(some, talk, question="a" * 61)
        assert (talk.session.messages, talk.session.pictures, some.turns.memory.taken.total()) == ([], [], 0)
        await answered(some, talk, *files[:2])
        assert some.turns.memory.taken["me"] == sum(len(one) for one in talk.session.pictures) == talk.held.amount > 2 * 6000
        with pytest.raises(ValueError, match="cannot be read"):
            await answered(talks(), other := some.new("me", "other"), __file__)
        assert (other.session.pictures, other.held.amount) == ([], 0)
        talk.session.messages *= 2
        with pytest.raises(OverLimit, match="5 messages, more than max_messages=3"):
            await answered(some, talk)

    asyncio.run(use())


def test_pictures_in_memory_are_shared_and_those_of_closed_pages_make_room(files: list[str]) -> None:
    async def use() -> None:
        size = 7000
        some = talks(max_memory_mb=5 * size / 2**20, max_share=0.5)
        first, second, third = (some.new(visitor, visitor) for visitor in ("one", "two", "three"))
        with pytest.raises(OverLimit, match=r"these pictures alone are more than the share of 0\.5 of max_memory_mb="):
            await answered(some, first, *files[:3])
        await answered(some, first, *files[:2])
        with pytest.raises(OverLimit, match="pictures of one visitor fill the share") as told:
            await answered(some, some.new("one", "second page"), files[0])
        assert told.value.code == 429
        await answered(some, second, *files[:2])
        with pytest.raises(OverLimit, match="pictures of all visitors fill max_memory_mb=") as told:
            await answered(some, third, files[0], files[1])
        assert told.value.code == 503
        some.leave("one")
        await answered(some, third, *files[:2])
        assert set(some.turns.memory.taken) == {"two", "three"}
        with pytest.raises(OverLimit, match="the conversation was ended while its page was closed"):
            await answered(some, first)
        some.new("two", "two")
        some.end(third)
        assert not some.turns.memory.taken

    asyncio.run(use())


def test_questions_wait_in_order_and_too_many_are_refused() -> None:
    async def use() -> None:
        some, order = talks(max_waiting=3, max_share=0.5), list[int]()

        async def ask(number: int, visitor: str) -> None:
            await answered(some, some.new(visitor, str(number)))
            order.append(number)

        asked = await asyncio.gather(*(ask(i, "mine" if i < 4 else str(i)) for i in range(8)), return_exceptions=True)
        told = [str(one) for one in asked if one is not None]
        assert order == sorted(order)
        assert len(order) == 4  # one at once, and three that waited
        assert [one for one in told if "one visitor fill the share of 0.5 of max_waiting=3; wait for their answers" in one]
        assert [one for one in told if "all visitors fill max_waiting=3; try again later" in one]
        talk = some.new("me", "mine")
        first = some.answer(talk, "one?", [], SHORT)
        await anext(first)
        with pytest.raises(OverLimit, match="your last question is still being answered"):
            await answered(some, talk)
        waits = asyncio.create_task(answered(some, other := some.new("you", "yours")))
        await asyncio.sleep(0)
        other.stop()
        await first.aclose()
        with pytest.raises(ValueError, match="stopped before it was answered"):
            await waits
        assert not some.turns.free.locked()

    asyncio.run(use())


def through_guard(folder: Path, use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], **limits: Any) -> None:
    """Use an application behind the guard, which writes what is uploaded to a folder."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message: dict[str, Any] = {"more_body": True}
        body = b""
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        status = 400 if body.startswith(b"bad") else 200
        if status == 200 and scope["path"].endswith("/upload"):
            (folder / str(len(list(folder.iterdir())))).write_bytes(body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def run() -> None:
        guard: Any = uploads.Guard(app, chat_settings(**limits), folder)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://here") as client:
            await use(client)

    asyncio.run(run())


def test_uploads_are_bounded_by_visitor_and_in_all_until_they_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        async def upload(body: bytes, visitor: str) -> tuple[int, str]:
            client.cookies.set(uploads.COOKIE, visitor)
            answer = await client.post("/gradio_api/upload", content=body)
            return answer.status_code, answer.text

        large = b"0" * 300_000
        assert "set-cookie" in (await client.get("/")).headers
        for _ in range(3):
            assert (await upload(b"bad" + large, "one"))[0] == 400  # which leaves nothing
        assert (await upload(large, "one"))[0] == 200
        status, told = await upload(large, "one")
        assert (status, told.startswith("uploads of one visitor fill the share of 0.5 of max_uploads_mb=1;")) == (429, True)
        assert [(await upload(large, str(i)))[0] for i in range(2)] == [200, 200]
        status, told = await upload(large, "late")
        assert (status, told) == (503, "uploads of all visitors fill max_uploads_mb=1; try again later")
        status, told = await upload(b"0" * 3_000_000, "large")
        assert (status, told) == (413, "2.9 MB are more than max_pictures=2 of max_upload_mb=1 allow")
        monkeypatch.setattr(uploads, "KEPT", -60)
        assert (await upload(large, "one"))[0] == 200
        assert len(list(tmp_path.iterdir())) == 1

    through_guard(tmp_path, use, max_uploads_mb=1, max_upload_mb=1, max_pictures=2, max_share=0.5)


def test_bodies_are_bounded_and_addresses_that_no_page_uses_are_refused(tmp_path: Path) -> None:
    async def chunks() -> Any:
        yield b"0" * 100

    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.post("/gradio_api/queue/join", content=b"0" * 1000)).status_code == 200
        refused = await client.post("/gradio_api/queue/join", content=b"0" * 1_100_000)
        assert (refused.status_code, refused.json()["detail"]) == (413, "1.0 MB are more than max_characters=100 allow")
        assert (await client.post("/gradio_api/run/predict", content=chunks())).status_code == 411
        assert (await client.post("/gradio_api/process_recording")).status_code == 404

    through_guard(tmp_path, use, max_characters=100)


def test_a_pool_gives_back_what_it_gave() -> None:
    pool = Pool("pictures", "max_memory_mb=1", 10, 1.0, "wait")
    with Holding(pool, "one") as held:
        held.take(4)
        held.leave(1)
        assert pool.taken == {"one": 1}
    held.close()
    with pytest.raises(OverLimit, match="has been ended"):
        held.take(1)
    assert not pool.taken


def test_a_password_stands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, "")
    monkeypatch.delenv(PASSWORD)
    words = ["run=a", "password=open, sesame", "ui=web"]
    assert hide_password(words) == ["run=a", f"password={HIDDEN}", "ui=web"]
    assert with_password({"password": HIDDEN})["password"] == "open, sesame"
    assert with_password({"password": None})["password"] == "open, sesame"
    assert "sesame" not in repr(chat_settings(password="sesame"))
    assert hide_password(["password='quoted'"]) == [f"password={HIDDEN}"]
    assert with_password({"password": HIDDEN})["password"] == "quoted"


def test_a_picture_takes_the_memory_of_its_file_until_it_is_looked_at() -> None:
    stream, talk = io.BytesIO(), Session(MODEL, CHATS)
    Image.fromarray(np.zeros((3000, 3000, 3), dtype=np.uint8)).save(stream, "PNG")
    talk.show(stream.getvalue())
    assert talk.pictures == [stream.getvalue()]
    assert list(talk.ask("what?", SHORT))
