"""A conversation without a user interface."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_toys import comparer, picture, session, talker

from lightning_internvl.chat.session import CaptionSession, Sampling, Session, visible_text
from lightning_internvl.data.tokenizer import stop_options
from lightning_internvl.inference.illustrate import Author
from lightning_internvl.inference.picture_search import Retriever
from lightning_internvl.model.vlm import VLM

SHORT = Sampling(max_new_tokens=12)
DRAWN = Sampling(temperature=2.0, max_new_tokens=12)


def test_the_answer_arrives_in_pieces_and_is_that_of_the_model() -> None:
    model, chats = talker()
    talk = Session(model, chats)
    talk.show(picture())
    pieces = list(talk.ask("what is it?", SHORT))
    assert pieces[-1] == Author(model, chats).ask("<image>\nwhat is it?", [picture()], max_new_tokens=12)
    assert all(pieces[-1].startswith(piece.rstrip("\ufffd")) for piece in pieces)
    assert talk.messages == [
        {"role": "user", "content": "<image>\nwhat is it?"},
        {"role": "assistant", "content": pieces[-1]},
    ]


def test_the_model_runs_in_the_precision_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that answers, too."""
    seen = list[bool]()
    read = VLM.generate

    def generate(model: VLM, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return read(model, *args, **kwargs)

    monkeypatch.setattr(VLM, "generate", generate)
    lower = partial(torch.autocast, "cpu", torch.bfloat16)
    for talk in (Session(*talker(), precision=lower), CaptionSession(*comparer(), precision=lower)):
        talk.show(picture())
        assert list(talk.ask("what is it?" if type(talk) is Session else "", SHORT))
    assert seen == [True, True]
    assert Retriever(*comparer(), precision=lower).images([picture()]).dtype == torch.float32


def test_later_questions_see_what_was_said_and_shown() -> None:
    model, chats = talker()
    talk = Session(model, chats)
    talk.show(picture(0))
    first = list(talk.ask("one?", SHORT))[-1]
    talk.show(picture(1))
    talk.show(picture(2))
    second = list(talk.ask("which is it: <image> or <image>?", SHORT))[-1]
    conversation = [
        {"role": "user", "content": "<image>\none?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "which is it: <image> or <image>?"},
    ]
    images = [picture(0), picture(1), picture(2)]
    batch = talk.chats.prompts([{"images": images, "conversation": conversation, "key": "all"}])
    end = stop_options(chats.tokenizer, "</s>")
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=0, **end)
    assert second == chats.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert talk.record()["images"] == ["picture"] * 3
    talk.reset()
    assert (talk.messages, talk.pictures, talk.waiting) == ([], [], 0)


def test_an_answer_can_be_stopped_and_the_conversation_goes_on() -> None:
    talk, threads = session(), threading.active_count()
    answer = talk.ask("one?", Sampling(max_new_tokens=200))
    written = next(answer)
    answer.close()
    assert threading.active_count() == threads
    assert talk.messages[-1] == {"role": "assistant", "content": written}
    whole = list(session().ask("one?", Sampling(max_new_tokens=200)))[-1]
    assert len(written) < len(whole)
    stopped = talk.ask("two?", Sampling(max_new_tokens=200))
    next(stopped)
    talk.stop()  # as a page does, from another thread
    last = list(stopped)[-1]
    assert talk.messages[-1] == {"role": "assistant", "content": last}
    assert list(talk.ask("three?", SHORT))


def test_draws_depend_on_the_seed_and_the_place_alone() -> None:
    one, two = (list(session().ask("one?", DRAWN))[-1] for _ in range(2))
    other = list(session().ask("one?", Sampling(temperature=2.0, max_new_tokens=12, seed=5)))[-1]
    assert one == two != other
    talk = session()
    assert list(talk.ask("one?", DRAWN))[-1] != list(talk.ask("one?", DRAWN))[-1]


def test_beams_come_whole() -> None:
    (answer,) = session().ask("one?", Sampling(beams=3, max_new_tokens=6))
    assert answer == answer.strip()


def test_a_marked_end_of_several_tokens_is_never_shown() -> None:
    assert visible_text("a fox##", "###", finished=False) == "a fox"
    assert visible_text("a fox#", "###", finished=False) == "a fox"
    assert visible_text("a fox##", "###", finished=True) == "a fox##"
    assert visible_text("a fox### and", "###", finished=False) == "a fox"
    assert visible_text(" caf\ufffd", "</s>", finished=False) == "caf"
    pieces = list(session(template="minigpt4").ask("one?", SHORT))
    assert not any("###" in piece for piece in pieces)


def test_a_faulty_question_leaves_the_conversation_as_it_was(tmp_path: Path) -> None:
    talk = session(context=64)
    talk.show(picture())
    with pytest.raises(ValueError, match="2 '<image>' in the question, but 1 pictures wait"):
        list(talk.ask("<image><image>"))
    with pytest.raises(ValueError, match="longer than the 64 tokens that the model reads"):
        list(talk.ask("why? " * 80))
    with pytest.raises(ValueError, match="text contains '<IMG_CONTEXT>'"):
        list(talk.ask("<IMG_CONTEXT>"))
    assert (talk.messages, talk.waiting) == ([], 1)
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.png cannot be read"):
        talk.show(tmp_path / "notes.png")
    assert talk.waiting == 1
    assert list(talk.ask("what is it?", SHORT))  # and it goes on
    with pytest.raises(ValueError, match="question is empty"):
        list(talk.ask("  "))


def test_a_middleware_that_writes_gives_captions() -> None:
    talk = CaptionSession(*comparer())
    with pytest.raises(ValueError, match="no picture yet"):
        list(talk.ask(""))
    talk.show(picture())
    (english,), (chinese,) = list(talk.ask("", SHORT)), list(talk.ask("zh", SHORT))
    assert [message["content"] for message in talk.messages] == ["<image>en", english, "zh", chinese]
    with pytest.raises(ValueError, match="reads no questions; say en or zh"):
        list(talk.ask("what is it?"))


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("max_new_tokens", 0), ("beams", 0), ("seed", -1)]
)
def test_sampling_says_what_is_wrong(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        Sampling(**{name: value})


def test_beams_draw_nothing() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Sampling(beams=2, temperature=0.5)
