"""The page of `chat.py ui=web`, asked over HTTP as its script in a browser asks it; no browser is needed."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import ROOT

if importlib.util.find_spec("gradio") is None:
    pytest.skip("the page needs Gradio: pip install -r requirements-chat.txt", allow_module_level=True)
import httpx  # which Gradio brings

from lightning_internvl.distributed.run_lock import this_process
from lightning_internvl.distributed.scratch import OWNER
from lightning_internvl.files import TEMPORARY, write_json

PASSWORD = "open sesame"


class Visit:
    """One visitor of a page."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=40, trust_env=False)
        self.http.post("login", data={"username": "me", "password": PASSWORD}).raise_for_status()
        self.config, self.session = self.http.get("config").json(), uuid.uuid4().hex
        self.events: list[dict[str, Any]] = []

    def id_of(self, name: str) -> int:
        """The number of a component with an elem_id."""
        return next(one["id"] for one in self.config["components"] if one["props"].get("elem_id") == name)

    def join(self, component: int | None, event: str, *values: Any) -> httpx.Response:
        """Begin an event."""
        (chosen,) = [d for d in self.config["dependencies"] if [component, event] in [list(t) for t in d["targets"]]]
        data = [*values, *([None] * (len(chosen["inputs"]) - len(values)))]
        for place, number in enumerate(chosen["inputs"][len(values) :], start=len(values)):
            data[place] = next(one for one in self.config["components"] if one["id"] == number)["props"].get("value")
        body = {"data": data, "fn_index": chosen["id"], "session_hash": self.session, "trigger_id": component, "event_data": None}
        return self.http.post("gradio_api/queue/join", json=body)

    def told_events(self) -> Any:
        """The stream of what happens."""
        return self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session})

    @contextmanager
    def asked(self, question: str) -> Iterator[None]:
        """A question, of whose answer a part is written."""
        self.join(self.id_of("box"), "submit", {"text": question, "files": []}, []).raise_for_status()
        with self.told_events() as stream:
            next(line for line in stream.iter_lines() if "process_generating" in line)
            yield

    def run(self, component: int | None, event: str, *values: Any) -> list[Any]:
        """Let an event happen; the last values that come back, those of all updates in `events`."""
        self.join(component, event, *values).raise_for_status()
        self.events = []
        end = time.monotonic() + 60  # signs of life come every few seconds: reading itself never times out
        with self.told_events() as stream:
            for line in stream.iter_lines():
                assert time.monotonic() < end, self.events
                if line.startswith("data:"):
                    self.events.append(json.loads(line.removeprefix("data:")))
                    if self.events[-1]["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                        break
        assert self.events[-1]["msg"] == "process_completed", self.events[-1]
        assert self.events[-1]["success"], self.events[-1]
        return self.events[-1]["output"]["data"]

    def begin(self) -> None:
        """Let the conversation begin, as a page does that is loaded."""
        (load,) = [one for one in self.config["dependencies"] if one["targets"][0][1] == "load"]
        self.run(load["targets"][0][0], "load")

    def told(self) -> str:
        """What the last event warned of."""
        (told,) = [event["log"] for event in self.events if event["msg"] == "log"]
        return told

    def upload(self, name: str, content: bytes) -> Any:
        """The answer to a file that is uploaded."""
        return self.http.post("gradio_api/upload", files={"files": (name, content)})


def png(*size: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size or (40, 30), "red").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page in a process of its own, as Gradio leaves sockets open that only the end of a process closes."""
    folder = tmp_path_factory.mktemp("page")
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / f"{number}.png")
    here = Path(__file__).parent
    uploads = tmp_path_factory.mktemp("uploads")
    killed = uploads / f"{TEMPORARY}chat_killed"
    write_json(killed / OWNER, this_process() | {"started": "long ago"})
    paths = f"{ROOT}{os.pathsep}{here}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TMPDIR": str(uploads)}
    command = [sys.executable, str(here / "served_toy.py"), str(folder), json.dumps({"password": PASSWORD})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as served:
        try:
            line = next(line for line in served.stdout if "Ctrl-C ends" in line)
            assert list(uploads.glob(f"{TEMPORARY}chat_*"))
            assert not killed.exists()
            address = next(word for word in line.split() if word.startswith("http"))
            yield address
            visit = Visit(address)
            visit.begin()
            with visit.asked("say something long"):  # an answer that is being written does not hold it up
                served.send_signal(signal.SIGTERM)  # a background job ignores Ctrl-C, and one under nohup SIGHUP
                assert served.wait(timeout=30) == 128 + signal.SIGTERM
            visit.http.close()
            assert not list(uploads.glob(f"{TEMPORARY}*"))
        finally:
            served.kill()


@pytest.fixture
def visit(address: str) -> Iterator[Visit]:
    """A visitor for whom a conversation has begun."""
    visit = Visit(address)
    visit.begin()
    yield visit
    visit.http.close()


def ask(visit: Visit, history: list[Any], question: str, *files: str) -> tuple[list[Any], dict[str, Any]]:
    """The conversation and the box after a question about uploaded files."""
    shown = [{"path": file, "meta": {"_type": "gradio.FileData"}} for file in files]
    return visit.run(visit.id_of("box"), "submit", {"text": question, "files": shown}, history)


def texts(history: list[Any], role: str) -> list[str]:
    return [one["text"] for turn in history if turn["role"] == role for one in turn["content"] if one["type"] == "text"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_is_reached_from_this_machine_only(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    port = address.rstrip("/").rpartition(":")[2]
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if f":{int(port):04X} " in line]
    assert f"0100007F:{int(port):04X}" in listening
    assert f"00000000:{int(port):04X}" not in listening


def test_visitors_are_asked_for_the_password(address: str) -> None:
    for path in ("config", "gradio_api/queue/data?session_hash=a"):
        assert httpx.get(address + path, trust_env=False).status_code == 401
    assert httpx.post(address + "gradio_api/upload", files={"files": ("a.png", png())}, trust_env=False).status_code == 401
    assert httpx.post(address + "login", data={"username": "me", "password": "wrong"}, trust_env=False).status_code == 400


def test_a_visitor_who_leaves_does_not_hold_up_the_others(address: str, visit: Visit) -> None:
    other = Visit(address)
    other.begin()
    with other.asked("say something long"):
        pass
    other.http.close()
    history, _ = ask(visit, [], "are you there?")
    assert texts(history, "assistant")[0]


def test_what_the_page_does_not_use_or_cannot_hold_is_refused(visit: Visit) -> None:
    assert visit.http.post("gradio_api/process_recording", files={"video": ("a.mp4", b"")}).status_code == 404
    refused = visit.join(visit.id_of("box"), "submit", {"text": "a" * 2_000_000, "files": []}, [])
    assert (refused.status_code, "max_characters=100000" in refused.json()["detail"]) == (413, True)
    history, box = ask(visit, [], "a" * 100_001)
    assert "100001 characters, more than max_characters=100000; begin a new one" in visit.told()
    assert (history, len(box["value"]["text"])) == ([], 100_001)


def test_a_conversation_about_several_pictures_is_streamed(visit: Visit) -> None:
    files = [visit.upload(name, png()).json()[0] for name in ("one.png", "two.png")]
    history, box = ask(visit, [], "what are they?", *files)
    assert [turn["role"] for turn in history] == ["user", "user", "user", "assistant"]
    assert [one["file"]["path"] for turn in history[:2] for one in turn["content"]] == files
    assert texts(history, "user") == ["what are they?"]
    assert texts(history, "assistant")[0]
    assert (box["submit_btn"], box["stop_btn"]) == (True, False)
    assert sum(event["msg"] == "process_generating" for event in visit.events) > 2
    first = next(event for event in visit.events if event["msg"] == "process_generating")["output"]["data"]
    assert (first[1]["submit_btn"], first[1]["stop_btn"]) == (False, True)
    history, _ = ask(visit, history, "and now?")
    assert texts(history, "user") == ["what are they?", "and now?"]
    assert len(texts(history, "assistant")) == 2
    emptied, *_ = visit.run(visit.id_of("new"), "click")
    assert emptied == []


def test_tags_in_a_question_are_shown(visit: Visit) -> None:
    history, _ = ask(visit, [], "<b>bold</b> <script>alert(1)</script>")
    assert texts(history, "user") == ["&lt;b>bold&lt;/b> &lt;script>alert(1)&lt;/script>"]


@pytest.mark.parametrize("fault", ["no picture", "too many pixels"])
def test_a_faulty_picture_is_told_and_the_page_goes_on(fault: str, visit: Visit) -> None:
    stream = io.BytesIO(b"not a picture at all")
    if fault == "too many pixels":
        Image.new("1", (20_000, 10_000)).save(stream, "PNG", optimize=True)
    wrong, right = (visit.upload(name, content).json()[0] for name, content in (("w.png", stream.getvalue()), ("r.png", png())))
    history, box = ask(visit, [], "what is it?", wrong)
    told = visit.told()
    assert "w.png" in told
    assert ("cannot be read" if fault == "no picture" else "200000000 pixels") in told
    assert str(Path(wrong).parent) not in told
    assert (history, box["value"]["text"], box["submit_btn"]) == ([], "what is it?", True)
    history, _ = ask(visit, [], "what is it?", right)
    assert texts(history, "assistant")[0]


def test_uploads_are_limited_in_size(visit: Visit) -> None:
    assert visit.upload("large.png", b"0" * (2**20 + 2**16)).status_code == 413
    assert visit.upload("small.png", png()).status_code == 200


def test_a_file_that_was_not_uploaded_is_not_served(visit: Visit) -> None:
    assert visit.http.get(f"gradio_api/file={Path(__file__)}").status_code in (403, 404)


def test_words_find_pictures(visit: Visit) -> None:
    (words,) = [one["id"] for one in visit.config["components"] if one["type"] == "textbox"]
    (found,) = visit.run(words, "submit", "two cats on a red background")
    scores = [float(one["caption"]) for one in found]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    (first,) = visit.run(words, "submit", " ")
    assert [one["caption"] for one in first] == ["0.png", "1.png"]
