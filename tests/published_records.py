"""Records in every spelling that other projects publish, and what each is read as."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image

A, B = "a.png", "b.png"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def said(content: Any = "Cat", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


CODED = base64.b64encode(png()).decode()
# A record, the texts of its messages, its pictures and its videos
READ: dict[str, tuple[dict[str, Any], list[str], list[Any], list[Any]]] = {
    "Qwen-VL": (
        {
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nPicture 2: <img>b/b.jpg</img>\nWhich?"},
                {"from": "assistant", "value": "One"},
            ]
        },
        ["<image>\n<image>\nWhich?", "One"],
        [A, "b/b.jpg"],
        [],
    ),
    "system key": (
        {"system": "Be brief.", "image": A, "conversations": [user("<image>\nWhat?"), said()]},
        ["Be brief.", "<image>\nWhat?", "Cat"],
        [A],
        [],
    ),
    "pictures on messages": (
        {"messages": [user("What?", image=A), said(), user("<image> and?", images=[B]), said("Dog")]},
        ["<image>\nWhat?", "Cat", "<image> and?", "Dog"],
        [A, B],
        [],
    ),
    "ImageHere": (
        {"image_paths": [A, B], "messages": [user("<ImageHere> <Img><ImageHere></Img>Which?"), said()]},
        ["<image> <image>Which?", "Cat"],
        [A, B],
        [],
    ),
    "numbers out of order": (
        {"images": [A, B], "messages": [user("<image2>, then <|image_1|>?"), said()]},
        ["<image>, then <image>?", "Cat"],
        [B, A],
        [],
    ),
    "numbers from 0": (
        {"images": [A, B], "messages": [user("<image_0><image_1>"), said()]},
        ["<image><image>", "Cat"],
        [A, B],
        [],
    ),
    "placeholder": ({"img": A, "messages": [user("<image_placeholder>What?"), said()]}, ["<image>What?", "Cat"], [A], []),
    "typed Qwen2-VL tokens": (
        {"image": A, "messages": [user("<|vision_start|><|image_pad|><|vision_end|>What?"), said()]},
        ["<image>What?", "Cat"],
        [A],
        [],
    ),
    "typed InternVL tokens": (
        {"image": A, "messages": [user("<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?"), said()]},
        ["<image>\nWhat?", "Cat"],
        [A],
        [],
    ),
    "question and answer": ({"image": A, "question": "What?", "answer": "Cat"}, ["<image>\nWhat?", "Cat"], [A], []),
    "query and response": (
        {"images": [A], "query": "<image>And?", "response": "Dog", "history": [["What?", "Cat"]]},
        ["What?", "Cat", "<image>And?", "Dog"],
        [A],
        [],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3", "system": "S"}, ["S", "Add.\n1 2", "3"], [], []),
    "Alpaca without input": ({"instruction": "Add.", "input": "", "output": "3"}, ["Add.", "3"], [], []),
    "prompt and completion": ({"prompt": "What?", "completion": "Cat", "image": A}, ["<image>\nWhat?", "Cat"], [A], []),
    "prompt and completion as messages": (
        {"prompt": [user([{"type": "image"}, {"type": "text", "text": "What?"}])], "completion": [said()], "images": [A]},
        ["<image>\nWhat?", "Cat"],
        [A],
        [],
    ),
    "texts": (
        {"images": [A], "texts": [{"user": "What?", "assistant": "Cat", "source": "x"}, {"user": "Sure?", "assistant": "Yes"}]},
        ["<image>\nWhat?", "Cat", "Sure?", "Yes"],
        [A],
        [],
    ),
    "JSON in a column": (
        {"images": '["a.png", "b.png"]', "conversations": json.dumps([user("Which?"), said()])},
        ["<image>\n<image>\nWhich?", "Cat"],
        [A, B],
        [],
    ),
    "base64": ({"image": CODED, "messages": [user("What?"), said()]}, ["<image>\nWhat?", "Cat"], [png()], []),
    "data URL": (
        {
            "messages": [
                user(
                    [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODED}", "detail": "low"}},
                        {"type": "text", "text": "What?"},
                    ]
                ),
                said(),
            ]
        },
        ["<image>\nWhat?", "Cat"],
        [png()],
        [],
    ),
    "backslashes": (
        {"image": "images\\a.png", "caption": "Cat"},
        ["<image>\nDescribe the image briefly.", "Cat"],
        ["images/a.png"],
        [],
    ),
    "frames": (
        {"video": ["f1.jpg", "f2.jpg"], "messages": [user("<video>What?"), said()]},
        ["<video>What?", "Cat"],
        [],
        [("f1.jpg", "f2.jpg")],
    ),
    "frames of a part": (
        {"messages": [user([{"type": "video", "video": ["f1.png", "f2.png"]}, {"type": "text", "text": "What?"}]), said()]},
        ["<video>\nWhat?", "Cat"],
        [],
        [("f1.png", "f2.png")],
    ),
    "lists of frames": (
        {"videos": [["f1.jpg"], ["g1.jpg", "g2.jpg"]], "messages": [user("What?"), said()]},
        ["<video>\n<video>\nWhat?", "Cat"],
        [],
        [("f1.jpg",), ("g1.jpg", "g2.jpg")],
    ),
    "a byte order mark": ({"messages": [user("\ufeffWhat?"), said("\ufeffCat")]}, ["What?", "Cat"], [], []),
    "other roles": (
        {"conversations": [{"from": "Human", "value": "What?"}, {"from": "chatgpt", "value": "Cat"}]},
        ["What?", "Cat"],
        [],
        [],
    ),
    "bytes and a name": (
        {"image": {"bytes": png()}, "file_name": "x.png", "caption": "Cat"},
        ["<image>\nDescribe the image briefly.", "Cat"],
        [png()],
        [],
    ),
}
