"""A conversation in the terminal."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.inference.picture_search import Gallery, SearchHit
from lightning_internvl.messages import did_you_mean

PROMPT = "> "


def as_lines(found: Sequence[SearchHit]) -> str:
    """Pictures with their similarities, the best first."""
    return "\n".join(f"{one.similarity:6.3f}  {one.path}" for one in found)


class Terminal:
    """Reads lines until the end of input or /quit. A line that begins with "/" is a command, any
    other one is said to the model.

    Args:
        gallery: pictures to look for, or None.
        found: how many of them are shown.
    """

    def __init__(self, loaded: Loaded, sampling: Sampling, gallery: Gallery | None = None, found: int = 8) -> None:
        self.name, self.sampling, self.found = loaded.name, sampling, found
        # there are commands only for what is not None
        self.gallery: Gallery | Any = gallery
        self.session: Session | Any = loaded.session() if loaded.session else None
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {"help": (self.help, "this list")}
        if self.session:
            self.commands |= {
                "image": (self.image, "PATH ...  show pictures with the next question"),
                "reset": (self.reset, "forget the conversation"),
                "save": (self.save, "FILE  write the conversation as a line of JSON, as training reads it"),
                "set": (self.set, "NAME=VALUE ...  change temperature, top_p, max_new_tokens, beams or seed"),
            }
        if gallery:
            self.commands["find"] = (self.find, f"TEXT  the nearest of {len(gallery.paths)} pictures")
        self.commands["quit"] = (self.help, "end (or Ctrl-D); Ctrl-C stops an answer")

    def run(self) -> None:
        """Talk."""
        print(f"{self.name}: {self.session.hint if self.session else 'say what to look for'}; /help for more")
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D ends)")
                continue
            if line == "/quit":
                return
            self.take(line)

    def take(self, line: str) -> None:
        """Do what one line says. A fault is told and ends nothing."""
        try:
            if line.startswith("/"):
                self.command(line)
            elif self.session is None:
                self.find(line)
            elif line or hasattr(self.session, "pairs"):
                self.say(line)
        except ValueError as error:
            print(f"error: {error}")
        except OSError as error:
            print(f"error: {error.filename}: {error.strerror}")

    def command(self, line: str) -> None:
        """A line that begins with "/"."""
        word, _, rest = line[1:].partition(" ")
        if word not in self.commands:
            raise ValueError(f"there is no command /{word}; {did_you_mean(word, self.commands)}")
        self.commands[word][0](rest.strip())

    def say(self, question: str) -> None:
        """Ask, and print the answer as it is written."""
        printed = ""
        try:
            for text in self.session.ask(question, self.sampling):
                if text.startswith(printed):
                    print(text[len(printed) :], end="", flush=True)
                else:  # the end of a word has changed what stands before it
                    print(f"\n{text}", end="", flush=True)
                printed = text
            print()
        except KeyboardInterrupt:
            print(" [stopped]")

    def help(self, rest: str = "") -> None:
        """Name the commands."""
        for name, (_, text) in self.commands.items():
            print(f"  /{name:6} {text}")

    def image(self, rest: str) -> None:
        """Show pictures; all or none of them."""
        paths = shlex.split(rest)
        if not paths:
            raise ValueError("which picture? /image PATH, with quotes around a path with spaces")
        before = len(self.session.pictures)
        try:
            for path in paths:
                self.session.show(Path(path).expanduser())
        except ValueError:
            del self.session.pictures[before:], self.session.sources[before:]
            raise
        count = self.session.waiting
        print(f"({count} {'picture waits' if count == 1 else 'pictures wait'} for your question)")

    def reset(self, rest: str) -> None:
        """Begin a new conversation."""
        self.session.reset()
        print("(a new conversation)")

    def save(self, rest: str) -> None:
        """Add the conversation to a file."""
        if not rest:
            raise ValueError("where to? /save FILE.jsonl")
        if not self.session.messages:
            raise ValueError("nothing was said yet")
        with Path(rest).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.session.record(), ensure_ascii=False) + "\n")
        print(f"(saved to {rest})")

    def set(self, rest: str) -> None:
        """Change how words are chosen."""
        kinds = {field.name: type(getattr(self.sampling, field.name)) for field in dataclasses.fields(Sampling)}
        changes = {}
        for word in rest.split():
            name, equals, value = word.partition("=")
            if name not in kinds or not equals:
                raise ValueError(f"{word!r} is no setting; write NAME=VALUE; {did_you_mean(name, kinds)}")
            try:
                changes[name] = kinds[name](value)
            except ValueError as error:
                raise ValueError(f"{name}={value!r} must be a number") from error
        self.sampling = dataclasses.replace(self.sampling, **changes)
        print("(" + ", ".join(f"{name}={getattr(self.sampling, name)}" for name in kinds) + ")")

    def find(self, text: str) -> None:
        """Print the pictures nearest to a text."""
        if not text:
            raise ValueError("say what to look for")
        print(as_lines(self.gallery.search([text], self.found)[0]))
