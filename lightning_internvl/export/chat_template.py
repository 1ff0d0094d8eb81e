"""The chat template of an exported folder: the base's own where it makes the ids that the run was
trained on, else the run's chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.data.jinja_templates import jinja_of
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.export import check
from lightning_internvl.export.base_folder import base_chat_template
from lightning_internvl.export.processor_files import ProcessorFiles
from lightning_internvl.inference.collators import View

NAME = "chat_template.jinja"


def own_template(files: ProcessorFiles, view: View) -> str:
    """The run's chat format as a template."""
    return jinja_of(view.chats.template, files.picture, files.film)


def keep_base_template(folder: Path, base: Path | None, files: ProcessorFiles, view: View, processor: Any) -> bool:
    """Put the base's template in the place of ours where both make the same of every prompt.

    Args:
        base: the folder that the run started from, where it is here.
        processor: of the exported folder, by whose ids they are compared; None where the class
            that reads the folder takes text alone, which is compared then.
    """
    text = base_chat_template(base, view.chats.tokenizer)
    if not text or (processor is None and files.picture != IMAGE):
        return False
    agrees = _same_ids if processor is not None else _same_texts
    if not agrees(text, files, view, processor):
        return False
    (folder / NAME).write_text(text, encoding="utf-8")
    return True


def _same_ids(text: str, files: ProcessorFiles, view: View, processor: Any) -> bool:
    """With the line break between a picture and the question from the template (InternVL, LLaVA), or
    from the message (Qwen2-VL)."""

    def same(joint: str, prompt: check.Prompt) -> bool:
        messages = listed(prompt.sample["conversation"], joint)
        ids = prompt_ids(processor, text, messages, prompt.sample["images"])
        return ids == prompt.inputs["input_ids"].tolist()

    return any(all(same(joint, prompt) for prompt in check.sample_prompts(view)) for joint in ("", "\n"))


def _same_texts(text: str, files: ProcessorFiles, view: View, processor: Any) -> bool:
    own, tokenizer = own_template(files, view), view.chats.tokenizer
    for prompt in check.sample_prompts(view):
        theirs, ours = (written(tokenizer, one, prompt.sample["conversation"]) for one in (text, own))
        if theirs is None or _without_bos(theirs, tokenizer) != _without_bos(ours or "", tokenizer):
            return False
    return True


def _without_bos(text: str, tokenizer: Any) -> str:
    return text.removeprefix(tokenizer.bos_token or "")


def prompt_ids(processor: Any, template: str, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Any:
    """The ids that a processor makes of messages, (1, L) as lists; None for what the template
    refuses. As `apply_chat_template` of processors does, tokens that the tokenizer adds by itself
    are left out where the text begins with them."""
    text = written(processor.tokenizer, template, messages)
    if text is None:
        return None
    begins = text.startswith(processor.tokenizer.bos_token or "\0")
    try:
        found = processor(text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=not begins)
    except Exception:  # other counts of pictures, of whatever kind the library raises
        return None
    return found["input_ids"].tolist()


def written(tokenizer: Any, template: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What a template writes for messages and the begin of an answer; None for what it refuses.
    transformers renders it in a sandbox."""
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception:  # of any kind: what a template does is its author's
        return None


def listed(messages: Sequence[Mapping[str, str]], joint: str) -> list[dict[str, Any]]:
    """Messages with pictures as transformers has them: the pictures of a message, then `joint` and
    its text."""
    found = []
    for message in messages:
        said = message["content"]
        pictures: list[dict[str, str]] = [{"type": "image"}] * said.count(IMAGE)
        text = (joint if pictures else "") + said.replace(IMAGE, "").lstrip("\n")
        found.append({"role": message["role"], "content": [*pictures, {"type": "text", "text": text}]})
    return found
