"""The conversation in the terminal, with scripted input."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import pytest
from chat_toys import comparer, picture, session
from PIL import Image

from lightning_internvl.chat import terminal as terminal_module
from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.session import CaptionSession, Sampling
from lightning_internvl.chat.terminal import Terminal
from lightning_internvl.inference.picture_search import Gallery, Retriever

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two words"):
        Image.fromarray(picture(len(name))).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.jpg").write_text("no picture")
    return tmp_path


def talk(lines: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> list[str]:
    """What the terminal prints; the prompts it leaves out."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    terminal.run()
    return [line.removeprefix("> ") for line in capsys.readouterr().out.splitlines()]


def test_a_conversation(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save = folder / "talk.jsonl"
    lines = [
        f'/image {folder}/one.png "{folder}/two words.png"', "what are they?", "and now?", f"/save {save}",
        "/set temperature=0.5 max_new_tokens=3", "/reset", f"/save {save}", "/help",
    ]  # fmt: skip
    out = talk("\n".join(lines), capsys, monkeypatch, Terminal(Loaded("a toy", session, None), SHORT))
    expected = session()
    expected.show(folder / "one.png")
    expected.show(folder / "two words.png")
    answers = [list(expected.ask(question, SHORT))[-1] for question in ("what are they?", "and now?")]
    assert out[0] == "a toy: ask about a picture: /image PATH, then your question; /help for more"
    assert out[1] == "(2 pictures wait for your question)"
    assert "\n".join(out[2:]).startswith("\n".join(answers))
    assert "(temperature=0.5, top_p=1.0, max_new_tokens=3, beams=1, seed=0)" in out
    assert "error: nothing was said yet" in out
    assert any(line.strip().startswith("/quit") for line in out)
    (record,) = [json.loads(line) for line in save.read_text().splitlines()]
    assert record == {"images": [f"{folder}/one.png", f"{folder}/two words.png"], "messages": expected.messages}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imgae x.png", "there is no command /imgae; did you mean 'image'? valid choices: help, image, reset"),
        ("/image", "which picture? /image PATH"),
        ("/image nowhere.png", "image nowhere.png does not exist"),
        ("/image {folder}/one.png {folder}/notes.jpg", "notes.jpg cannot be read"),
        ("/image 'a.png", "No closing quotation"),
        ("/save", "where to? /save FILE.jsonl"),
        ("/set hot=1", "'hot=1' is no setting; write NAME=VALUE; valid choices: temperature, top_p"),
        ("/set seed=x", "seed='x' must be a number"),
        ("/set top_p=2", "top_p=2.0 must be above 0 and at most 1"),
        ("/find a cat", "there is no command /find"),
    ],
)
def test_a_faulty_line_is_told_and_ends_nothing(
    line: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(Loaded("a toy", session, None), SHORT)
    out = talk(f"{line.format(folder=folder)}\n/quit\nnever read", capsys, monkeypatch, terminal)
    assert out[1].startswith("error: ")
    assert message in out[1]
    assert out[2:] == [""]  # /quit
    assert (terminal.session.pictures, terminal.session.messages) == ([], [])


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(Loaded("a toy", session, None), Sampling(max_new_tokens=200))
    sent: list[bool] = []

    def slow(*values: object, **options: object) -> None:
        print(*values, **options)
        if options.get("flush") and str(values[0]).strip() and not sent:  # the first words of the answer
            sent.append(True)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal_module, "print", slow, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    out = talk("a question\n/quit\n", capsys, monkeypatch, terminal)
    signal.signal(signal.SIGINT, before)
    assert "[stopped]" in out[-1] or "[stopped]" in out[-2]
    whole = list(session().ask("a question", Sampling(max_new_tokens=200)))[-1]
    assert 0 < len(terminal.session.messages[-1]["content"]) < len(whole)


def test_ctrl_c_at_the_prompt_tells_how_to_leave(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([KeyboardInterrupt, EOFError])

    def key(prompt: str) -> str:
        raise next(keys)

    monkeypatch.setattr(terminal_module, "input", key, raising=False)
    Terminal(Loaded("a toy", session, None), SHORT).run()
    assert "(/quit or Ctrl-D ends)" in capsys.readouterr().out


def test_without_a_decoder_lines_are_looked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "notes.jpg").unlink()
    retriever = Retriever(*comparer())
    gallery = Gallery(folder, retriever)
    out = talk("a cat\n\n", capsys, monkeypatch, Terminal(Loaded("a toy", None, retriever), SHORT, gallery, found=1))
    best = gallery.search(["a cat"], 1)[0][0]
    assert out[1].split() == [f"{best.similarity:.3f}", *str(best.path).split()]
    assert "error: say what to look for" in out


def test_captions(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = comparer()
    loaded = Loaded("a toy", lambda: CaptionSession(model, pairs), None)
    out = talk(f"/image {folder}/one.png\n\nwhat?\n", capsys, monkeypatch, Terminal(loaded, SHORT))
    assert "this stage writes captions" in out[0]
    assert "error: this model writes captions and reads no questions; say en or zh or other, or nothing" in out
