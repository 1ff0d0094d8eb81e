"""A conversation with a model, whatever shows it: messages, pictures, answers word by word."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import TooLong
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.files.images import image_size, read_image
from lightning_internvl.data.files.lazy_pictures import LazyPictures
from lightning_internvl.data.templates import IMAGE, Message, message_of
from lightning_internvl.inference.device import on_device
from lightning_internvl.inference.predictor import Precision, context_length
from lightning_internvl.model.vlm import VLM


@dataclass(frozen=True)
class Sampling:
    """How the words of an answer are chosen.

    Args:
        temperature: 0 takes the likeliest token each time; larger values draw more freely.
        top_p: draws are made among the likeliest tokens that together have this probability.
        max_new_tokens: length of an answer.
        beams: more than 1 keep as many beginnings and draw nothing; such an answer comes whole.
        seed: of the draws; the same question at the same place gets the same answer.

    Raises:
        ValueError: for a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        faults = {
            "temperature": self.temperature < 0 and "0 or more",
            "top_p": not 0 < self.top_p <= 1 and "above 0 and at most 1",
            "max_new_tokens": self.max_new_tokens < 1 and "1 or more",
            "beams": self.beams < 1 and "1 or more",
            "seed": not 0 <= self.seed < 2**63 and "from 0 on",
        }
        for name, valid in faults.items():
            if valid:
                raise ValueError(f"{name}={getattr(self, name)} must be {valid}")
        if self.beams > 1 and self.temperature > 0:
            both = f"beams={self.beams} and temperature={self.temperature}"
            raise ValueError(f"{both} exclude each other; set one of them back")

    def options(self) -> dict[str, Any]:
        """What `generate` of transformers is told."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature > 0 else {}
        return {"do_sample": self.temperature > 0, "num_beams": self.beams, **drawn}


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: of the conversation before it, pictures and words.
        answer_tokens: of the answer, its end mark among them.
        finish: "stop" where the model or a stop word ended it, "length" where its room did.
    """

    prompt_tokens: int
    answer_tokens: int
    finish: str


class Session:
    """One conversation.

    Attributes:
        messages: all that was said; "<image>" in a message stands for a picture.
        pictures: those of all messages in order, then those that wait for the next question; as
            files, which are decoded one at a time whenever they are looked at, or as they were given.
        sources: a name for each picture.
        usage: of the last answer that ended; None before the first one.

    Args:
        chats: how the model reads conversations.
        precision: makes the context that the model runs in.
    """

    hint = "ask about a picture: /image PATH, then your question"
    _stop_flag: _StopFlag | None = None  # of the answer that is being written

    def __init__(self, model: VLM, chats: ChatCollator, precision: Precision = nullcontext) -> None:
        self.model, self.chats, self.precision = model, copy.copy(chats), precision
        self.context = context_length(model) or chats.max_length
        self.chats.max_length = self.context - 1
        self.reset()

    def reset(self) -> None:
        """Forget everything, and end an answer that is being written."""
        self.stop()
        self.messages: list[Message] = []
        self.pictures: list[bytes | np.ndarray] = []
        self.sources: list[str] = []
        self.usage: Usage | None = None

    def stop(self) -> None:
        """End the answer that is being written, from any thread; what has been written stays."""
        if self._stop_flag:
            self._stop_flag.stop = True

    @property
    def waiting(self) -> int:
        """How many pictures the next question is about."""
        return len(self.pictures) - sum(m["content"].count(IMAGE) for m in self.messages)

    def show(self, picture: str | Path | bytes | np.ndarray, decode: bool = True) -> None:
        """Add a picture, a file or (H, W, 3) uint8, to the next question.

        Args:
            decode: whether a file is looked at as a whole, not its header alone; a fault of the
                rest is then told here, not by `ask`.

        Raises:
            ValueError: for a file that is no picture, or too large a one.
        """
        named = isinstance(picture, str | Path)
        if not isinstance(picture, np.ndarray):
            read_image(picture) if decode else image_size(picture)
        self.pictures.append(Path(picture).read_bytes() if isinstance(picture, str | Path) else picture)
        self.sources.append(str(picture) if named else "picture")

    def tell(self, role: str, parts: Sequence[str]) -> None:
        """Add a message that was said before; `parts`: texts, and a mark for each of its pictures,
        which have been shown."""
        self.messages.append(self.chats.template.written(message_of(role, parts)))

    def ask(self, question: str | Sequence[str], sampling: Sampling | None = None, stop: Sequence[str] = ()) -> Iterator[str]:
        """The answer as far as it is written, again and again. An iterator that is closed, or a
        Ctrl-C, ends the answer where it is; what had been written by then stays in the
        conversation.

        Args:
            question: a text, or texts and marks of pictures in order.
            stop: words that end the answer and do not belong to it.

        Raises:
            ValueError: for a question that cannot be asked; the conversation is then as it was.
        """
        parts = [question.strip()] if isinstance(question, str) else list(question)
        marks = "".join(parts).count(IMAGE)
        if marks not in (0, self.waiting):
            raise ValueError(f"{marks} {IMAGE!r} in the question, but {self.waiting} pictures wait for it")
        asked = self.chats.template.written(message_of("user", parts if marks else [*[IMAGE] * self.waiting, *parts]))
        if not asked["content"].strip():
            raise ValueError("the question is empty")
        messages = self.messages  # not those of a new conversation that begins meanwhile
        messages.append(asked)
        text, complete = "", False
        try:
            with closing(self._written(sampling or Sampling(), stop)) as written:
                for text in written:
                    yield text
            complete = True
        finally:
            if text or complete:
                messages.append({"role": "assistant", "content": text})
            else:
                messages.pop()

    def record(self) -> dict[str, Any]:
        """The conversation as a line of training data: names of its pictures, `messages`."""
        asked = len(self.pictures) - self.waiting
        return {"images": self.sources[:asked], "messages": list(self.messages)}

    def _written(self, sampling: Sampling, stop: Sequence[str]) -> Generator[str, None, None]:
        tokenizer, length = self.chats.tokenizer, sum(m["content"].count(IMAGE) for m in self.messages)
        sample = {"images": _OneByOne(self.pictures[:length], _decoded), "conversation": self.messages, "key": "question"}
        try:
            batch = self.chats.prompts([sample])
        except TooLong as error:
            most = f"the {self.context} tokens that the model reads"
            raise ValueError(f"the conversation is longer than {most}; start a new one") from error
        end = self.chats.template.end(tokenizer.eos_token)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        prompt_tokens = batch["input_ids"].shape[1]
        longest = min(sampling.max_new_tokens, max(1, self.context - prompt_tokens))
        options = {**sampling.options(), "max_new_tokens": longest, "pad_token_id": pad}
        options |= self.chats.stop_options()
        if stop:
            options |= {"stop_strings": [*options.get("stop_strings", ()), *stop], "tokenizer": tokenizer}
        self._stop_flag, before = _StopFlag(), None
        seed = sampling.seed + len(self.messages)
        for ids, finished in _generated(self.model, batch, options, self._stop_flag, seed, self.precision):
            said = tokenizer.batch_decode([ids], skip_special_tokens=True)[0]
            text = self.chats.said(visible_text(said, end, finished), sample, finished)
            for word in stop:
                text = visible_text(text, word, finished)
            if finished:
                ended = len(ids) < longest or ids[-1] == options["eos_token_id"] or any(w in said for w in (end, *stop) if w)
                self.usage = Usage(prompt_tokens, len(ids), "stop" if ended else "length")
            if text != before and (text or finished):
                yield (before := text)


class CaptionSession(Session):
    """A middleware that writes captions: it is shown a picture, and may be told a language."""

    def __init__(self, model: VLM, pairs: PairCollator, precision: Precision = nullcontext) -> None:
        self.model, self.pairs, self.precision = model, pairs, precision
        languages = ", ".join(pairs.caption_prompts)
        how = f"/image PATH, then a language ({languages}) or an empty line"
        self.hint = f"this stage writes captions: {how}"
        self.reset()

    def ask(self, question: str | Sequence[str], sampling: Sampling | None = None, stop: Sequence[str] = ()) -> Iterator[str]:
        """The caption of the picture shown last."""
        prompts, sampling = self.pairs.caption_prompts, sampling or Sampling()
        question = question if isinstance(question, str) else "".join(question).replace(IMAGE, "")
        language = question.strip() or next(iter(prompts))
        if language not in prompts:
            raise ValueError(f"this model writes captions and reads no questions; say {' or '.join(prompts)}, or nothing")
        if not self.pictures:
            raise ValueError("there is no picture yet; show one first")
        if sampling.temperature > 0 or stop:
            vain = "stop words" if stop else f"temperature={sampling.temperature}"
            raise ValueError(f"this model writes captions, the likeliest words alone: {vain} cannot be followed; leave it out")
        device, prompt = _device(self.model), self.pairs.prompt_ids(prompts[language])
        with self.precision():
            ids = self.model.generate(
                on_device(self.model, self.pairs.pixels([_decoded(self.pictures[-1])], ["picture"])),
                torch.tensor([prompt], device=device),
                max_new_tokens=sampling.max_new_tokens,
                eos_id=(eos := self.pairs.tokenizer.eos_token_id),
                num_beams=sampling.beams,
            )
        (caption,) = self.pairs.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.usage = Usage(
            len(prompt), ids.shape[1], "stop" if eos in ids or ids.shape[1] < sampling.max_new_tokens else "length"
        )
        self.messages += [
            {"role": "user", "content": IMAGE * self.waiting + language},
            {"role": "assistant", "content": caption.strip()},
        ]
        yield caption.strip()


class _OneByOne(LazyPictures):
    """Pictures of which one at a time is decoded."""

    __iter__ = Sequence.__iter__


def _decoded(picture: bytes | np.ndarray) -> np.ndarray:
    return picture if isinstance(picture, np.ndarray) else read_image(picture)


def visible_text(text: str, end: str, finished: bool) -> str:
    """A text up to its end mark, or without half a character or half an end mark."""
    text, ended, _ = text.partition(end) if end else (text, "", "")
    if finished or ended:
        return text.strip()
    text = text.rstrip("\ufffd")
    halves = (size for size in range(len(end) - 1, 0, -1) if text.endswith(end[:size]))
    return text[: len(text) - next(halves, 0)].strip()


def _device(model: VLM) -> torch.device:
    return next(model.parameters()).device


class _StopFlag(StoppingCriteria):
    """Ends the answer when it is told to."""

    def __init__(self) -> None:
        self.stop = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stop, dtype=torch.bool, device=input_ids.device)


class _Writers:
    """The threads of this process that write answers, with what ends each."""

    def __init__(self) -> None:
        self.running: dict[threading.Thread, _StopFlag] = {}
        self.lock, self.has_ended = threading.Lock(), False

    def start(self, thread: threading.Thread, flag: _StopFlag) -> None:
        """Start one. Raises ValueError where the program ends."""
        with self.lock:
            if self.has_ended:
                raise ValueError("the program ends")
            self.running[thread] = flag
            thread.start()


_WRITERS = _Writers()


def end_answers(seconds: float = 10.0) -> None:
    """End all answers that are being written, and begin no other one, before the program ends:
    PyTorch does not survive that a thread is lost in the midst of it."""
    with _WRITERS.lock:
        _WRITERS.has_ended, running = True, dict(_WRITERS.running)
    for thread, flag in running.items():
        flag.stop = True
        thread.join(seconds)


class _Tokens(BaseStreamer):
    """Puts each new token of the one row into a queue."""

    def __init__(self, found: queue.SimpleQueue[Any]) -> None:
        self.found, self.prompt = found, True

    def put(self, value: Tensor) -> None:
        if not self.prompt:  # which comes first
            self.found.put(value.flatten().tolist())
        self.prompt = False

    def end(self) -> None:
        """Nothing: `generate` returns then."""


def _generated(
    model: VLM, batch: dict[str, Tensor], options: dict[str, Any], flag: _StopFlag, seed: int, precision: Precision
) -> Iterator[tuple[list[int], bool]]:
    """New ids, all so far at a time, and whether they are all. `generate` runs in a thread, which
    ends with this iterator."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    device = _device(model)
    streamer = _Tokens(found) if options["num_beams"] == 1 else None

    def work() -> None:
        try:
            with precision(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                inputs = {name: on_device(model, tensor) for name, tensor in batch.items()}
                new = model.generate(**inputs, **options, streamer=streamer, stopping_criteria=[flag])
            found.put(new[0].cpu())
        except BaseException as error:  # handed to the thread that asked
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    _WRITERS.start(thread, flag)
    ids: list[int] = []
    try:
        while True:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            if not isinstance(item, list):
                yield item.tolist(), True
                return
            ids += item
            if found.empty():  # who shows it may be slower than the model
                yield ids, False
    finally:
        flag.stop = True
        thread.join()
        _WRITERS.running.pop(thread, None)
