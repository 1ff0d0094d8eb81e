"""Plain: a picture and its caption on one line, without any question; for training a connector on captions."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(name="plain", user="{}", assistant="", answer_end="\n", keep_user_text=False)
