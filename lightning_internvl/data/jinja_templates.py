"""A chat format as `chat_template.jinja`, so that `apply_chat_template` of transformers writes the
text that was trained on.

Messages are those of transformers: `content` is a text in which "<image>" marks a picture, as in
training data, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`, which are joined
as `ChatTemplate.written` does. Servers send several messages of a user in a row;
each is written as one, and the assistant's turn begins after the last.
"""

from __future__ import annotations

import json
import re

from lightning_internvl.data.templates import IMAGE, VIDEO, ChatTemplate
from lightning_internvl.data.templates.qwen import QwenTemplate

# The text of a message, with marks where its pictures and videos are.
_CONTENT = """\
{%- macro written(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for item in @PARTS@ -%}
      {%- if item['type'] == 'text' -%}
        {{- item['text'] ~ @BETWEEN_TEXTS@ -}}
      {%- else -%}
        {{- ('<video>' if 'video' in item['type'] else '<image>') ~ @JOINT@ -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
_SYSTEM = """\
{%- set ns = namespace(system=@SYSTEM@, text='', pictures=0) -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set ns.system = written(messages[0]['content']) -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
"""
_TURNS = """\
{%- for message in turns -%}
  {%- if message['role'] != 'user' and (message['role'] != 'assistant' or loop.first or loop.previtem['role'] != 'user') -%}
    {{- raise_exception('a conversation is an optional system message, then user and assistant in turn') -}}
  {%- endif -%}
  {%- set ns.text = written(message['content']) -%}
  {%- if message['role'] == 'user' -%}
    {%- if @HAS_SYSTEM@ -%}{{- @SYSTEM_BEFORE@ ~ ns.system ~ @SYSTEM_AFTER@ -}}{%- endif -%}
@PREPARED@
    {{- @USER@ -}}
    {%- if (loop.last and add_generation_prompt) or (not loop.last and loop.nextitem['role'] == 'assistant') -%}
      {{- @ASSISTANT@ -}}
    {%- endif -%}
  {%- else -%}
    {{- @ANSWER_START@ ~ ns.text ~ @ANSWER_END@ -}}
  {%- endif -%}
{%- endfor -%}
"""
_PICTURES_FIRST = (
    "(content | rejectattr('type', 'equalto', 'text') | list) + (content | selectattr('type', 'equalto', 'text') | list)"
)
# What some formats do to a user's message.
_NUMBERED = """\
    {%- set pieces = ns.text.split('<image>') -%}
    {%- set ns.text = pieces[0] -%}
    {%- for piece in pieces[1:] -%}
      {%- set ns.pictures = ns.pictures + 1 -%}
      {%- set ns.text = ns.text ~ 'Picture ' ~ ns.pictures ~ ': <image>\\n' ~ (piece[1:] if piece[:1] == '\\n' else piece) -%}
    {%- endfor -%}
"""
_MARKS_ALONE = """\
    {%- set ns.text = '<image>' * ns.text.count('<image>') -%}
"""
_IMAGES_FIRST = """\
    {{- @RUN@ * ns.text.count('<image>') -}}
    {%- set ns.text = ns.text.split('<image>') | map('trim') | select | join(' ') -%}
"""


def jinja_of(template: ChatTemplate, image: str, video: str | None = None) -> str:
    """The chat format in the language of transformers' chat templates.

    Args:
        image: what is written for each picture, usually its placeholder between the tokens around
            it; "" where the processor puts it in by itself.
        video: likewise for videos; None leaves their mark as it is.
    """
    run = template.image.replace(IMAGE, image)
    prepared = _NUMBERED if isinstance(template, QwenTemplate) else ""
    prepared += "" if template.keep_user_text else _MARKS_ALONE
    prepared += _IMAGES_FIRST if template.images_first else ""
    system_before, _, system_after = template.system_format.partition("{}")
    shown = f"ns.text.replace('{IMAGE}', {_quote(run)})"
    shown += "" if video is None else f".replace('{VIDEO}', {_quote(video)})"
    end = "eos_token" if template.answer_end is None else _quote(template.answer_end)
    if template.earlier_end is not None:
        end = f"({end} if loop.last else {_quote(template.earlier_end)})"
    values = {
        "HAS_SYSTEM": "loop.first" if template.bare_system else "loop.first and ns.system",
        # In other quotation marks than `texts_of` reads, so that older folders are recognised
        "JOINT": repr(template.joint),
        "BETWEEN_TEXTS": "('' if loop.last else ' ')" if template.parts_last else "''",
        "PARTS": _PICTURES_FIRST if template.parts_last else "content",
        "RUN": _quote(run),
        "SYSTEM": _quote(template.system),
        "SYSTEM_BEFORE": _quote(system_before),
        "SYSTEM_AFTER": _quote(system_after),
        "USER": f" ~ ({shown}) ~ ".join(_quote(part) for part in template.user.split("{}")),
        "ASSISTANT": _quote(template.assistant),
        "ANSWER_START": _quote(template.answer_start),
        "ANSWER_END": f"{end} ~ {_quote(template.after_answer)}",
    }
    start = "{{- bos_token or '' -}}\n" if template.begins_with_bos else ""
    source = _CONTENT + _SYSTEM + start + _TURNS.replace("@PREPARED@\n", prepared)
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], source)


def texts_of(jinja: str) -> tuple[list[str], list[bool]]:
    """The texts that a template of `jinja_of` writes, in order, and what it does to messages: equal
    for the same chat format in this version's words and in those of earlier ones."""
    marks = (_NUMBERED, _MARKS_ALONE, "* ns.text.count('<image>') -}}", "bos_token or ''", "~ eos_token ~")
    return re.findall(r'"(?:[^"\\]|\\.)*"', jinja), [mark in jinja for mark in marks]


def _quote(text: str) -> str:
    """A string of the template language, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
