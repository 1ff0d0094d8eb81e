"""Map-style datasets of your own files: image-caption pairs, and conversations about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_internvl.data.image_files import read_image
from lightning_internvl.data.records import RecordFile
from lightning_internvl.data.templates import IMAGE, VIDEO, Message
from lightning_internvl.data.video_files import read_video

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class _FileDataset(Dataset[dict[str, Any]]):
    """Samples of a file of records (see `RecordFile`).

    Args:
        path: the file; None is answered with the setting to give.
        image_root: where the paths of pictures start; None: the file's folder.
        length: only that many records, from the first on.
    """

    what: str
    setting: str

    def __init__(self, path: str | Path | None, image_root: str | Path | None = None, length: int | None = None) -> None:
        if path is None:
            raise ValueError(f"no file of {self.what} is given; give {self.setting}=FILE")
        self.records, self.length = RecordFile(path), length
        self.image_root = self.records.path.parent if image_root is None else Path(image_root)

    def __len__(self) -> int:
        return len(self.records) if self.length is None else min(self.length, len(self.records))

    def __getitem__(self, position: int) -> dict[str, Any]:
        record, line = self.records.read(position)
        try:
            return {**self.sample(record), "key": f"{self.records.path.name}:{line}"}
        except ValueError as error:
            raise ValueError(f"{self.records.path}, line {line}: {error}") from error

    def sample(self, record: dict[str, Any]) -> dict[str, Any]:
        """What a record says, without its key. Raises ValueError when it cannot be used."""
        raise TypeError(f"{type(self).__name__} must say what a record is")

    def image(self, name: Any) -> np.ndarray:
        """The picture of a path in a record, (H, W, 3) uint8."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is no path of a picture")
        return read_image(self.image_root / name)

    def video(self, name: Any) -> tuple[np.ndarray, float]:
        """The video of a path in a record, (F, H, W, 3) uint8, and its frames a second."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is no path of a video")
        return read_video(self.image_root / name)


class PairsFile(_FileDataset):
    """{"image": (H, W, 3) uint8, "caption", "language", "image_id", "key"} from {image, caption[, language]} records.

    `image_id` is the path, so that all captions of one picture are known to be its own. Raises ValueError naming file and line
    for a record that cannot be used.
    """

    what, setting = "image-caption pairs", "data.pairs_path"

    def __init__(
        self,
        path: str | Path | None,
        image_root: str | Path | None = None,
        length: int | None = None,
        language: str = "en",
    ) -> None:
        super().__init__(path, image_root, length)
        self.language = language

    def sample(self, record: dict[str, Any]) -> dict[str, Any]:
        """Picture and caption of a record."""
        if missing := [name for name in ("image", "caption") if name not in record]:
            raise ValueError(f"not a record with image and caption: {' and '.join(missing)} missing")
        name, caption = str(record["image"] or ""), str(record["caption"] or "").strip()
        if not name or not caption:
            raise ValueError(f"the {'caption' if name else 'image'} is empty")
        language = record.get("language") or self.language
        return {"image": self.image(name), "caption": caption, "language": language, "image_id": name}


class ChatsFile(_FileDataset):
    """{"images": [(H, W, 3) uint8], "conversation": [messages], "key"} from conversations in one of two formats.

    LLaVA, ShareGPT, InternVL: {"image": path or [paths], "conversations": [{"from": "human" or "gpt", "value": text}]};
    messages: {"images": [paths], "messages": [{"role": "user" or "assistant", "content": text}]}. Text alone has no picture.
    Where no "<image>" marks the places of the pictures, they come before the first question. Videos are given and marked likewise
    ("video" or "videos", "<video>"; see `read_video`), and stand under "videos" with their frames a second. An answer before the
    first question and a question after the last answer are left out. Raises ValueError naming file and line for a record that
    cannot be used.
    """

    what, setting = "conversations", "data.chats_path"

    def sample(self, record: dict[str, Any]) -> dict[str, Any]:
        """Pictures and conversation of a record."""
        messages = read_messages(record)
        names = _marked(record.get("image") or record.get("images"), messages, IMAGE, "pictures")
        found = {"images": [self.image(name) for name in names], "conversation": messages}
        if videos := record.get("video") or record.get("videos"):
            found["videos"] = [self.video(name) for name in _marked(videos, messages, VIDEO, "videos")]
        return found


def _marked(names: Any, messages: Sequence[Message], mark: str, what: str) -> list[Any]:
    """The paths of pictures or videos, whose marks are put before the first question where there are none."""
    names = [names] if isinstance(names, str) else list(names or [])
    marks = sum(message["content"].count(mark) for message in messages)
    if names and not marks:
        first = next(message for message in messages if message["role"] == "user")
        first["content"], marks = f"{mark}\n" * len(names) + first["content"], len(names)
    if marks != len(names):
        raise ValueError(f"{len(names)} {what} but {marks} {mark!r} marks")
    return names


def read_messages(record: dict[str, Any]) -> list[Message]:
    """The messages of a record in either format, from the first question (after a system message) to the last answer.

    Raises ValueError for another format, an unknown role, text that is none, and a conversation without an answer.
    """
    if "conversations" in record:
        turns, role, text = record["conversations"], "from", "value"
    elif "messages" in record:
        turns, role, text = record["messages"], "role", "content"
    else:
        raise ValueError(f"not a conversation: no 'conversations' or 'messages' among {sorted(record)}")
    if not isinstance(turns, list):
        raise ValueError(f"not a list of messages: {turns!r:.200}")
    messages = [_message(turn, role, text) for turn in turns]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise ValueError("the conversation has no question with an answer")
    end = len(roles) - roles[::-1].index("assistant")
    return system + _from_first_question(messages[len(system) : end])


def _from_first_question(messages: Sequence[Message]) -> list[Message]:
    """Without answers that stand before any question."""
    start = next(place for place, message in enumerate(messages) if message["role"] != "assistant")
    return list(messages[start:])


def _message(turn: Any, role: str, text: str) -> Message:
    if not isinstance(turn, dict) or turn.get(role) not in ROLES or not isinstance(turn.get(text), str):
        raise ValueError(f"not a message with {role!r} (one of {', '.join(ROLES)}) and {text!r}: {turn!r:.200}")
    return {"role": ROLES[turn[role]], "content": turn[text]}
