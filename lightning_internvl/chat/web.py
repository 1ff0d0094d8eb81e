"""The page: a conversation about uploaded pictures, and a search through a folder of them."""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when the library is imported

import gradio as gr
from starlette.middleware import Middleware

from lightning_internvl.chat.examples import Example, draw_scenes, examples_of
from lightning_internvl.chat.limits import MB, listen, share_heaps, told_of_access
from lightning_internvl.chat.loading import Loaded, gallery_of
from lightning_internvl.chat.session import CaptionSession, Sampling, end_answers
from lightning_internvl.chat.settings import SIGNALS, ChatSettings
from lightning_internvl.chat.talks import Talk, Talks
from lightning_internvl.chat.uploads import KEPT, Guard, visitor_of
from lightning_internvl.data.files.images import IMAGE_SUFFIXES, read_image
from lightning_internvl.distributed.scratch import scratch_folder
from lightning_internvl.distributed.signals import WATCH
from lightning_internvl.inference.picture_search import Gallery

STYLE = Path(__file__).with_name("page.css")
THREADS = 40  # beside those of questions that wait
THUMBNAIL = 512  # side in pixels of a picture that was found
# Of the system: nothing is fetched.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
TAG = re.compile(r"<(?=[/a-zA-Z|])")
Updates = tuple[Any, ...]


def serve(loaded: Loaded, settings: ChatSettings, sampling: Sampling) -> None:
    """Show the page until Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        ConfigError: for a port that is taken.
    """
    share_heaps()
    # Uploads and drawn pictures, gone with the program, or with the next one if it is killed.
    with WATCH.installed(*SIGNALS), scratch_folder("chat") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
        page = make_page(loaded, settings, sampling, folder)
        print(f"{loaded.name}: {launch(page, settings)} (Ctrl-C ends)")
        if line := told_of_access(settings.host, settings.is_local, settings.password):
            print(line)
        try:
            page.block_thread()
        finally:
            end_answers()


def launch(page: gr.Blocks, settings: ChatSettings) -> str:
    """Start the page's server and give its address.

    Raises:
        ConfigError: for a port that is taken, or a host that is not this machine.
    """
    # The library looks whether its server is up.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    hues: dict[str, Any] = {"primary_hue": gr.themes.colors.indigo, "neutral_hue": gr.themes.colors.slate}
    theme = gr.themes.Base(**hues, radius_size="lg", font=FONTS, font_mono=MONO)
    with listen(settings.host, settings.port) as free:
        port = free.getsockname()[1]
    guard = Middleware(Guard, limits=settings, folder=Path(os.environ["GRADIO_TEMP_DIR"]))
    _, address, _ = page.launch(
        server_name=settings.host,
        server_port=port,
        auth=_asks_for(settings.password),
        auth_message="The password is the same for all; any name will do.",
        max_threads=settings.max_waiting + THREADS,
        max_file_size=int(settings.max_upload_mb * MB),
        app_kwargs={"middleware": [guard]},
        theme=theme,
        css_paths=STYLE,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    return address


def _asks_for(password: str | None) -> Callable[[str, str], bool] | None:
    """What looks at the name and the password of a visitor; None where everyone may come in."""
    return None if password is None else lambda name, word: hmac.compare_digest(word.encode(), password.encode())


def make_page(loaded: Loaded, settings: ChatSettings, sampling: Sampling, folder: Path) -> gr.Blocks:
    """The page, not yet served.

    Args:
        folder: where pictures of the built-in scenes are drawn.

    Raises:
        ValueError: as `Gallery`.
    """
    gallery = _gallery(loaded, settings, folder)
    with gr.Blocks(title=f"Chat with {loaded.name}", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        gr.HTML(f"<header><h1>Lightning InternVL</h1><p>{_escaped(loaded.name)}</p></header>")
        with gr.Tabs():
            if loaded.session:
                examples = examples_of(loaded.scenes, folder / "examples") if loaded.scenes else []
                with gr.Tab("Chat"):
                    _chat_tab(page, Talks(loaded.session, settings), sampling, examples)
            if gallery:
                with gr.Tab("Find pictures"):
                    _search_tab(gallery, settings.found)
    return page.queue(default_concurrency_limit=None)


def _gallery(loaded: Loaded, settings: ChatSettings, folder: Path) -> Gallery | None:
    drawn = None
    if loaded.scenes and loaded.retriever and settings.gallery is None:
        drawn = str(draw_scenes(loaded.scenes, folder / "scenes"))
    return gallery_of(loaded, settings.gallery or drawn)


# --- chat ---------------------------------------------------------------------------------------


def _chat_tab(page: gr.Blocks, talks: Talks, sampling: Sampling, examples: list[Example]) -> None:
    writes_captions = isinstance(talks.begin(), CaptionSession)
    session = gr.State(None, delete_callback=talks.end)
    chat = gr.Chatbot(
        show_label=False, height="min(62vh, 640px)", elem_id="chat", buttons=[], feedback_options=None, layout="bubble",
        placeholder="### Show a picture and ask about it", autoscroll=True,
        examples=[{"text": e.question, "files": [str(e.path)], "icon": str(e.path)} for e in examples],
    )  # fmt: skip
    box = gr.MultimodalTextbox(
        file_types=list(IMAGE_SUFFIXES), file_count="multiple", sources=["upload"],
        show_label=False, autofocus=True, elem_id="box",
        placeholder="Add a picture; en or zh chooses the language" if writes_captions else "Add pictures, ask a question",
    )  # fmt: skip
    with gr.Row(elem_id="below"):
        with gr.Accordion("Settings", open=False):
            controls = _controls(sampling, talks.limits.longest_answer)
        new = gr.Button("New conversation", size="sm", elem_id="new", scale=0, min_width=160)

    async def answer(value: Any, history: list[Any], talk: Talk, *chosen: Any) -> AsyncGenerator[Updates]:
        async with aclosing(_answered(talks, talk, value, history, chosen)) as changes:
            async for updates in changes:
                if talk.held.is_closed:  # a new conversation is shown by now
                    return
                yield updates

    def begins(request: gr.Request) -> Talk:
        assert request.request is not None  # of a browser
        return talks.new(visitor_of(request.request), request.session_hash or "")

    def left(request: gr.Request) -> None:
        talks.leave(request.session_hash or "")

    def begin_again(request: gr.Request) -> Updates:
        return [], begins(request), gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False)

    shown: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [chat, box]
    page.load(begins, None, session, api_visibility="private")
    page.unload(left)
    box.submit(answer, [box, chat, session, *controls], outputs, **shown)
    box.stop(lambda talk: talk.stop(), session, None, queue=False, **shown)
    chat.example_select(_picked, None, box, **shown).then(answer, [box, chat, session, *controls], outputs, **shown)
    gr.on([new.click, chat.clear], begin_again, None, [chat, session, box], queue=False, **shown)


def _controls(sampling: Sampling, longest: int) -> list[gr.components.Component]:
    """Temperature, top-p, length and seed, in this order."""
    with gr.Row():
        temperature = gr.Slider(0, 1.5, sampling.temperature, step=0.05, label="Temperature", info="0: the likeliest words")
        top_p = gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top-p", info="1: all words may be drawn")
    with gr.Row():
        length = gr.Slider(1, longest, sampling.max_new_tokens, step=1, label="Longest answer", info="in tokens")
        seed = gr.Number(sampling.seed, label="Seed", info="of the draws", precision=0, minimum=0)
    return [temperature, top_p, length, seed]


def _picked(event: gr.SelectData) -> Any:
    files = event.value.get("files", [])
    files = [file["path"] if isinstance(file, dict) else file for file in files]
    return {"text": event.value.get("text", ""), "files": files}


async def _answered(talks: Talks, talk: Talk, value: Any, history: list[Any], chosen: Sequence[Any]) -> AsyncGenerator[Updates]:
    """The conversation and the box, again and again while the answer is written."""
    text, files = (value or {}).get("text") or "", (value or {}).get("files") or []
    idle: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
    said = [{"role": "user", "content": {"path": file}} for file in files]
    said += [{"role": "user", "content": _escaped(text)}] if text.strip() else []
    try:
        temperature, top_p, length, seed = chosen
        sampling = Sampling(temperature, top_p, int(length), seed=int(seed or 0))
        yield [*history, *said], gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        written = ""
        async with aclosing(talks.answer(talk, text, files, sampling)) as texts:
            async for written in texts:
                yield [*history, *said, {"role": "assistant", "content": _escaped(written)}], gr.skip()
        nothing = "*(no answer: the model ended at once)*"
        answer = {"role": "assistant", "content": _escaped(written) or nothing}
        yield [*history, *said, answer], gr.MultimodalTextbox(**idle)
    except ValueError as error:
        gr.Warning(_told(str(error), files), title="That did not work", duration=15)
        yield history, gr.MultimodalTextbox(value={"text": text, "files": []}, **idle)


def _told(message: str, files: list[str]) -> str:
    """A message in which uploads have the names that they were given."""
    for file in files:
        message = message.replace(str(file), Path(file).name)
    return _escaped(message)


def _escaped(text: str) -> str:
    """Text whose tags are shown, not hidden: boxes are part of what a model says."""
    return TAG.sub("&lt;", text)


# --- search -------------------------------------------------------------------------------------


def _search_tab(gallery: Gallery, found: int) -> None:
    with gr.Row(elem_id="search", equal_height=True):
        text = gr.Textbox(show_label=False, placeholder="What should the picture show?", container=False, scale=1)
        look = gr.Button("Find", variant="primary", scale=0, min_width=110)
    first = [(_thumbnail(path), path.name) for path in gallery.paths[:found]]
    pictures = gr.Gallery(
        first, columns=4, object_fit="cover", show_label=False, elem_id="found", height="auto", buttons=[], interactive=False
    )
    count = len(gallery.paths)
    gr.Markdown(f"{count} {'picture' if count == 1 else 'pictures'}, compared with your words by the model. 1 is the same.")

    def search(words: str) -> list[tuple[Image.Image, str]]:
        if not words.strip():
            return first
        return [(_thumbnail(one.path), f"{one.similarity:.2f}") for one in gallery.search([words.strip()], found)[0]]

    gr.on([text.submit, look.click], search, text, pictures, show_progress="hidden", api_visibility="private")


def _thumbnail(path: Path) -> Image.Image:
    image = Image.fromarray(read_image(path))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
