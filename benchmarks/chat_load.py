"""What a page or an API of chat.py does under load: is each visitor answered or refused, and how much memory does it take?

python benchmarks/chat_load.py run=RUN                                   # the page and the API, one after the other
python benchmarks/chat_load.py run=RUN ui=api questions=50 visitors=10 pictures=12 megapixels=80

Asked at once: `questions` short ones, then one of each of `visitors` with `pictures` pictures of `megapixels` each; 0 leaves
either out. Most of the time the server decodes visitors x pictures x megapixels. Each has a server of its own; memory is its
largest above what it had after one question. Prints a table and one JSON line.
"""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("answered", "refused", "broken")
HEAD = 33  # bytes of a PNG file before its second chunk
SETTINGS: dict[str, Any] = {
    "run": None, "ui": "web,api", "questions": 200, "visitors": 100, "pictures": 12,
    "megapixels": 12, "tokens": 16, "minutes": 60,
}  # fmt: skip
Ask = Callable[[str, int, list[bytes]], str]  # address, number of the visitor, pictures -> what came of it


def large_pictures(megapixels: float, count: int) -> list[bytes]:
    """PNG files of that many pixels: one picture, which takes seconds to write, with another note in each."""
    side, stream = int((megapixels * 1e6) ** 0.5), io.BytesIO()
    Image.merge("RGB", [Image.radial_gradient("L").resize((side, side))] * 3).save(stream, "PNG")
    head, rest = stream.getvalue()[:HEAD], stream.getvalue()[HEAD:]
    notes = [b"tEXtnumber\0%d" % number for number in range(count)]
    return [b"".join((head, struct.pack(">I", len(n) - 4), n, struct.pack(">I", zlib.crc32(n)), rest)) for n in notes]


def ask_api(address: str, number: int, pictures: list[bytes]) -> str:
    """One request to the API."""
    with httpx.Client(base_url=address, timeout=None, trust_env=False) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        urls = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in pictures]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": f"what is it, {number}?"}]
        told = http.post("/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": content}]})
        return "answered" if told.status_code == 200 else f"refused: {told.json()['error']['message']}"


def ask_page(address: str, number: int, pictures: list[bytes]) -> str:
    """One visit of the page, as its script in a browser asks it."""
    with httpx.Client(base_url=address, timeout=None, trust_env=False) as http:
        config, session = http.get("config").json(), uuid.uuid4().hex
        (box,) = [one["id"] for one in config["components"] if one["props"].get("elem_id") == "box"]
        _event(http, config, session, None, "load", [])
        files = []
        for picture in pictures:
            told = http.post("gradio_api/upload", files={"files": ("picture.png", picture)})
            if told.status_code != 200:
                return f"refused: {told.text}"
            files.append({"path": told.json()[0], "meta": {"_type": "gradio.FileData"}})
        return _event(http, config, session, box, "submit", [{"text": f"what is it, {number}?", "files": files}, []])


def _event(http: httpx.Client, config: dict[str, Any], session: str, component: int | None, name: str, values: list[Any]) -> str:
    """Let an event of the page happen, and wait for what comes of it."""
    (chosen,) = [d for d in config["dependencies"] if any(t[1] == name and component in (None, t[0]) for t in d["targets"])]
    props = {one["id"]: one["props"].get("value") for one in config["components"]}
    data = values + [props.get(number) for number in chosen["inputs"][len(values) :]]
    told = http.post("gradio_api/queue/join", json={"data": data, "fn_index": chosen["id"], "session_hash": session})
    if told.status_code != 200:
        return f"refused: {told.json()['detail']}"
    found = "broken: the page said nothing"
    with http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if event.get("msg") == "log":
                found = f"refused: {event['log']}"
            if event.get("msg") in ("process_completed", "close_stream", "unexpected_error"):
                done = bool(event.get("success"))
                return found if found.startswith("refused") else "answered" if done else f"broken: {event}"
    return found


def resident_mb(pid: int) -> float:
    """Memory of a process, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def measured(settings: dict[str, Any], ui: str, visitors: int, pictures: list[bytes]) -> dict[str, Any]:
    """What came of that many visitors at once, and the memory that they took."""
    ask: Ask = ask_page if ui == "web" else ask_api
    words = [f"run={settings['run']}", f"ui={ui}", "port=0", f"max_new_tokens={settings['tokens']}"]
    command, environment = [sys.executable, str(ROOT / "chat.py"), *words], os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as served:
        assert served.stdout is not None
        line = next(line for line in served.stdout if "Ctrl-C ends" in line)
        address = next(word for word in line.split() if word.startswith("http")).removesuffix("/v1")
        if not ask(address, -1, []).startswith("answered"):
            raise RuntimeError("the server does not answer one question")
        before = largest = resident_mb(served.pid)
        begun, done = time.monotonic(), threading.Event()

        def watch() -> None:
            nonlocal largest
            while not done.wait(0.02):
                largest = max(largest, resident_mb(served.pid))

        threading.Thread(target=watch, daemon=True).start()
        with ThreadPoolExecutor(visitors) as pool:
            waits = [pool.submit(ask, address, i, pictures) for i in range(visitors)]
            told = Counter(one.result(timeout=settings["minutes"] * 60) for one in waits)
        done.set()
        served.terminate()
    kinds = {
        kind: sum(count for text, count in told.items() if text.startswith(kind)) for kind in ("answered", "refused", "broken")
    }
    return {
        "ui": ui, "visitors": visitors, "pictures": len(pictures), **kinds, "seconds": round(time.monotonic() - begun, 1),
        "mb_over_model": round(largest - before), "reasons": [text for text in told if text != "answered"][:4],
    }  # fmt: skip


def main() -> None:
    """Measure what the command line asks for."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if "run" not in given or (strange := set(given) - set(SETTINGS)):
        raise SystemExit(f"give run=RUN and any of {', '.join(SETTINGS)}" + (f"; not {strange}" if "run" in given else ""))
    settings = SETTINGS | {name: value if name in ("run", "ui") else int(value) for name, value in given.items()}
    pictures = large_pictures(settings["megapixels"], settings["pictures"])
    rows = []
    print("ui   " + " ".join(f"{name:>8}" for name in ("visitors", "pictures", *KINDS, "seconds")) + f" {'MB over model':>14}")
    for ui in settings["ui"].split(","):
        for visitors, shown in ((settings["questions"], []), (settings["visitors"], pictures)):
            if not visitors:
                continue
            row = measured(settings, ui, visitors, shown)
            columns = (row[name] for name in ("visitors", "pictures", *KINDS, "seconds"))
            print(f"{ui:4} " + " ".join(f"{value:>8}" for value in columns) + f" {row['mb_over_model']:>14}", flush=True)
            rows.append(row)
    print(json.dumps({"megapixels": settings["megapixels"], "mb_each": round(len(pictures[0]) / 2**20, 2), "rows": rows}))


if __name__ == "__main__":
    main()
