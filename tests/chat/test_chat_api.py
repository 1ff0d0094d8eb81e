"""The API of `chat.py ui=api`, asked by OpenAI's own client over a socket of this process."""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_toys import chat_settings, comparer, picture, talker
from PIL import Image

from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.session import CaptionSession, Sampling, Session
from lightning_internvl.data.templates import IMAGE, message_of
from lightning_internvl.inference.picture_search import Retriever

pytest.importorskip("gradio", reason="the API needs what Gradio brings: pip install -r requirements-chat.txt")
openai = pytest.importorskip("openai", reason="the API is asked by OpenAI's client: pip install openai")
import uvicorn  # noqa: E402 (which Gradio brings)

from lightning_internvl.chat.api import Api  # noqa: E402 (needs it)
from lightning_internvl.chat.limits import listen  # noqa: E402

LENGTH = 12  # tokens of an answer
MODEL, CHATS = talker(context=512)
PAIRS = Retriever(*comparer())


class Served:
    """An API that listens, and a client of it."""

    def __init__(self, api: Api, port: int, password: str) -> None:
        self.api, self.address = api, f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=password, max_retries=0, timeout=30)

    def chat(self, messages: str | list[dict[str, Any]], **options: Any) -> Any:
        """The answer to one question, or a conversation."""
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.client.chat.completions.create(model=self.api.id, messages=messages, **options)

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and answer to a body as it is."""
        asked = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"} | headers)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def serving(loaded: Loaded | None = None, password: str | None = None, **changes: Any) -> Iterator[Served]:
    """An API over untrained models."""
    settings = chat_settings(max_new_tokens=LENGTH, password=password, **changes)
    loaded = loaded or Loaded("a toy, stage one", lambda: Session(MODEL, CHATS), PAIRS)
    api = Api(loaded, settings, Sampling(max_new_tokens=LENGTH))
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(api.app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(api, listening.getsockname()[1], password or "any")
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


def data_url(image: np.ndarray, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}


def said(question: str, *pictures: np.ndarray, **sampling: Any) -> tuple[str, Session]:
    """What the terminal would say."""
    talk = Session(MODEL, CHATS)
    for one in pictures:
        talk.show(one)
    return list(talk.ask(question, Sampling(max_new_tokens=LENGTH, **sampling)))[-1], talk


def test_an_answer_is_that_of_the_terminal_and_is_counted(served: Served) -> None:
    answer = served.chat("what is it?")
    text, talk = said("what is it?")
    assert answer.choices[0].message.content == text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (talk.usage.prompt_tokens, talk.usage.answer_tokens)
    assert answer.choices[0].finish_reason == talk.usage.finish == "length"
    assert served.chat("what is it?", max_tokens=3).usage.completion_tokens == 3
    assert served.chat("what is it?", max_completion_tokens=2).usage.completion_tokens == 2


def test_pictures_stand_where_they_were_put_and_earlier_messages_are_read(served: Served) -> None:
    first, second = picture(0), picture(1)
    text, talk = said("which is it: <image> or <image>?", first, second)
    parts = ["which is it: ", shown(data_url(first)), " or ", shown(data_url(second)), "?"]
    written = CHATS.template.written(message_of("user", ["which is it: ", IMAGE, " or ", IMAGE, "?"]))
    assert served.chat([user(*parts)]).choices[0].message.content == said(written["content"], first, second)[0]
    before = [{"role": "system", "content": "be brief"}, user(shown(data_url(first)), "one?")]
    later = served.chat([*before, {"role": "assistant", "content": text}, user("and now?")])
    talk = Session(MODEL, CHATS)
    talk.show(first)
    for role, content in (("system", "be brief"), ("user", "<image>\none?"), ("assistant", text)):
        talk.tell(role, [content])
    assert later.choices[0].message.content == list(talk.ask("and now?", Sampling(max_new_tokens=LENGTH)))[-1]
    assert later.usage.prompt_tokens == talk.usage.prompt_tokens


def test_a_stream_gives_the_same_answer_in_pieces(served: Served) -> None:
    asked: dict[str, Any] = {"temperature": 0.8, "seed": 7, "n": 2}
    whole = served.chat("one?", **asked)
    pieces = list(served.chat("one?", **asked, stream=True, stream_options={"include_usage": True}))
    texts = ["".join(p.choices[0].delta.content or "" for p in pieces if p.choices and p.choices[0].index == i) for i in (0, 1)]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] == said("one?", temperature=0.8, seed=7)[0] != texts[1]
    assert len(pieces) > 8
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == ["length"] * 2
    assert pieces[-1].usage == whole.usage


def test_stop_words_end_an_answer_and_are_no_part_of_it(served: Served) -> None:
    text = served.chat("one?").choices[0].message.content
    word = text[5:8]
    for options in ({}, {"stream": True}):
        stopped = served.chat("one?", stop=["nowhere", word], **options)
        found = "".join(p.choices[0].delta.content or "" for p in stopped) if options else stopped.choices[0].message.content
        assert found == text[: text.index(word)].strip()
    assert served.chat("one?", stop=word).choices[0].finish_reason == "stop"


def test_a_reader_who_leaves_ends_the_answer_and_the_next_one_is_served() -> None:
    with serving(max_waiting=1, max_share=1.0) as one:
        with one.chat("one?", stream=True, max_tokens=400) as stream, ThreadPoolExecutor(1) as other:
            next(iter(stream))
            waits = other.submit(one.chat, "two?", max_tokens=2)
            while not one.api.turns.waiting.taken:
                assert not waits.done()
            with pytest.raises(openai.InternalServerError, match="questions of all visitors fill max_waiting=1") as told:
                one.chat("three?")
            assert (told.value.status_code, told.value.code) == (503, "overloaded")
            stream.close()
            assert waits.result(timeout=20).usage.completion_tokens == 2
        assert not one.api.turns.waiting.taken
        assert not one.api.turns.memory.taken


def test_embeddings_of_texts_and_pictures(served: Served) -> None:
    made = served.client.embeddings.create
    image = picture(3)
    texts = made(model=served.api.id, input=["a cat", "two dogs"])
    assert np.allclose([one.embedding for one in texts.data], PAIRS.texts(["a cat", "two dogs"]).numpy(), atol=1e-6)
    assert texts.usage.prompt_tokens == sum(map(len, PAIRS.pairs.rows("itc", ["a cat", "two dogs"])[0]))
    mixed: Any = [shown(data_url(image)), {"type": "text", "text": "a cat"}]
    if len(PAIRS.images([image])[0]) == 1:
        both = made(model=served.api.id, input=mixed, encoding_format="float")
        assert np.allclose(both.data[0].embedding, PAIRS.images([image])[0, 0].numpy(), atol=1e-6)
        assert np.allclose(both.data[1].embedding, texts.data[0].embedding, atol=1e-6)
    with pytest.raises(openai.BadRequestError, match=r"a text has \d+ tokens, more than the"):
        made(model=served.api.id, input="word " * 200)


def test_models(served: Served) -> None:
    assert [one.id for one in served.client.models.list()] == ["a-toy-stage-one"]
    assert served.client.models.retrieve("a-toy-stage-one").owned_by == "lightning_internvl"
    with pytest.raises(openai.NotFoundError, match="no model 'other'; this server has 'a-toy-stage-one'"):
        served.client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "a"}])
    assert served.post(b"{}", "/v1/completions")[0] == 404


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
        ({"temperature": 3}, "less than or equal to 2", "temperature"),
        ({"top_p": 0}, "greater than 0", "top_p"),
        ({"n": 9}, "less than or equal to 8", "n"),
        ({"max_tokens": 5000}, "max_tokens=5000 must be at most 1024", "max_tokens"),
        ({"seed": -1}, "greater than or equal to 0", "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop has 5 words, at most 4", "stop"),
        ({"logprobs": True}, "logprobs=true is not offered by this server", "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not offered", "presence_penalty"),
        ({"tools": [{"type": "function"}]}, "tools=[{", "tools"),
        ({"response_format": {"type": "json_object"}}, "is not offered", "response_format"),
        ({"tempreture": 1}, "no parameter 'tempreture'; did you mean 'temperature'?", "tempreture"),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"messages": "hello"}, "messages: Input should be a valid list", "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: Input should be 'system', 'developer'", None),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message must be the user's", "messages"),
        ({"messages": [user("a"), user("b")]}, "message 1 has role 'user', expected 'assistant'", "messages"),
        ({"messages": [user(" ")]}, "the question is empty", "messages"),
        ({"messages": [user("word " * 2000)]}, "the conversation is longer than the 512 tokens", "messages"),
        ({"messages": [user("a <image>")]}, "1 '<image>' in the question, but 0 pictures", "messages"),
        ({"messages": [user("a", shown("https://example.org/a.png"))]}, "trust=[https://example.org]", "image_url.url"),
        ({"messages": [user("a", shown("file:///etc/passwd"))]}, "trust=[file:///etc]", "image_url.url"),
        ({"messages": [user("a", shown("/etc/passwd"))]}, "files and addresses are not read", "image_url.url"),
        ({"messages": [user("a", shown("data:image/png;base64,####"))]}, "no base64", "image_url.url"),
        ({"messages": [user("a", shown("data:image/png;base64,AAAA"))]}, "cannot be read", "messages"),
        ({"messages": [user("a", shown("data:image/png,AAAA"))]}, "must be data:image/png;base64,", "image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio'", None),
    ],
)
def test_what_is_not_followed_is_told(changes: dict[str, Any], message: str, param: str | None, served: Served) -> None:
    body = {"model": served.api.id, "messages": [{"role": "user", "content": "a"}]} | changes
    status, told = served.post(json.dumps(body).encode())
    error = told["error"]
    assert (status, error["type"]) == (400, "invalid_request_error"), told
    assert message in error["message"]
    assert param is None or error["param"] == param


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    asked = {"logprobs": False, "tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"}, "user": "me"}
    before = served.chat("a").choices[0].message.model_dump() | {"tool_calls": None}
    served.chat([{"role": "user", "content": "a"}, before, {"role": "user", "content": "b"}], **asked)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'{"model": NaN}', b"\xff", b'{"messages": "\\ud800"}'])
def test_a_body_that_is_no_request(body: bytes, served: Served) -> None:
    status, told = served.post(body)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    assert served.post(b"{}", **{"Content-Type": "text/plain"})[0] == 400
    assert served.post(b"{}", Host="elsewhere.example")[0] == 403  # a page that calls this machine by a name of its own


def test_the_password_is_the_key() -> None:
    with serving(password="open sesame") as one:
        assert one.chat("a").choices
        for key in ("", "wrong"):
            with pytest.raises(openai.AuthenticationError, match="password is missing or wrong"):
                one.client.with_options(api_key=key or "none").models.list()
        assert one.post(b"{}")[0] == 401
        assert "sesame" not in repr(one.api.settings)


def test_limits() -> None:
    limits = {"max_pictures": 2, "max_messages": 3, "max_characters": 40, "max_upload_mb": 0.01, "max_memory_mb": 0.5}
    with serving(**limits) as one:
        small, large = shown(data_url(picture())), shown(data_url(picture(0, 90, 90)))
        assert one.chat([user("a", small, small)]).choices
        found = {
            "3 pictures, more than max_pictures=2": [user("a", small, small, small)],
            "4 messages, more than max_messages=3": [user("a")] * 4,
            "41 characters, more than max_characters=40": [user("a" * 41)],
            "more than max_upload_mb=0.01": [user("a", large)],
            "these pictures alone are more than the share of 0.25 of max_memory_mb=0.5": [user("a" * 70_000)],
        }
        for message, messages in found.items():
            with pytest.raises(openai.APIStatusError, match=message) as told:
                one.chat(messages)
            assert (told.value.status_code, told.value.code) == (413, "request_too_large")
        with pytest.raises(openai.APIStatusError, match="larger than 1 MB, which max_pictures, max_upload_mb"):
            one.chat("a" * 2_000_000)
        assert one.api.turns.memory.taken.total() == 0


def test_pictures_of_trusted_places_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for place in ("in/a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / place)
    with serving(trust=[f"file://{tmp_path}/in"]) as one:
        assert one.chat([user(shown(f"file://{tmp_path}/in/a.png"), "a")]).choices[0].message.content == said("a", picture())[0]
        for name in ("in/../b.png", "in/none.png"):
            with pytest.raises(openai.BadRequestError):
                one.chat([user(shown(f"file://{tmp_path}/{name}"), "a")])


def test_models_that_only_write_captions_or_only_compare() -> None:
    model, pairs = comparer()
    with serving(Loaded("captions", lambda: CaptionSession(model, pairs), None)) as one:
        answer = one.chat([user(shown(data_url(picture())), "zh")])
        assert answer.usage.completion_tokens <= LENGTH
        with pytest.raises(openai.BadRequestError, match=r"temperature=1\.0 cannot be followed"):
            one.chat([user(shown(data_url(picture())), "zh")], temperature=1.0)
        with pytest.raises(openai.BadRequestError, match="has no embeddings"):
            one.client.embeddings.create(model="captions", input="a")
    with serving(Loaded("compares", None, PAIRS)) as one, pytest.raises(openai.BadRequestError, match="no decoder to talk to"):
        one.chat("a")
