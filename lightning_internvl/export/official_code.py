"""What the official class of InternVL's own layout needs beside weights: the name of its chat
format, and its code, which is copied from where a run started and never run here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.data.templates import ChatTemplate
from lightning_internvl.files import read_json

# The text around messages by the name in `internvl/conversation.py`.
_MARKS = ("<|im_start|>user\n{}<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>")
_LINES = (f"{_MARKS[0]}\n", _MARKS[1], f"{_MARKS[2]}\n")
CONVERSATIONS: Mapping[tuple[str, bool], tuple[str, str, str]] = {
    ("internvl2_5", False): _LINES,
    ("internvl2_5", True): _LINES,
    ("internlm2-chat", True): _MARKS,
    ("Hermes-2", False): _MARKS,
    ("phi3-chat", True): ("<|user|>\n{}<|end|>", "<|assistant|>\n", "<|end|>"),
    ("internvl3_5_gpt_oss", False): ("<|start|>user<|message|>{}<|end|>", "<|start|>assistant", "<|return|>"),
}
LANGUAGES = tuple(f"{name}ForCausalLM" for name in ("Llama", "InternLM2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "GptOss"))
WANTS = "the official InternVLChatModel reads this folder"


def conversation_fields(template: ChatTemplate) -> dict[str, Any]:
    """`template` and `system_message` of `config.json`; nothing for a format that the official code
    does not have, or has under a name that is not known here."""
    text = template.user, template.assistant, f"{template.answer_end}{template.after_answer}"
    names = [name for (name, bos), known in CONVERSATIONS.items() if known == text and bos == template.begins_with_bos]
    return {"template": names[0], "system_message": template.system} if names else {}


def copy_code(folder: Path, start: str | None) -> dict[str, Any]:
    """The `auto_map` of the folder where a run started, after the code that it names was copied;
    nothing where that folder has none, or is not here."""
    base = Path(str(start))
    named = read_json(base / "config.json", {}).get("auto_map") or {}
    files = [base / f"{reference.partition('.')[0]}.py" for reference in named.values()]
    if not files or not all(file.is_file() for file in files):
        return {}
    for file in sorted(base.glob("*.py")):  # those that these import stand beside them
        shutil.copyfile(file, folder / file.name)
    return {"auto_map": named}


def official_notes(config: Mapping[str, Any]) -> list[str]:
    """What loads the folder, and what is not there."""
    language = config["llm_config"]["architectures"][0]
    if "template" not in config or language not in LANGUAGES:
        lacks = f"class for {language}" if "template" in config else "chat format like that of this run"
        return [f"the official code has no {lacks}: load_pretrained reads this folder, InternVLChatModel does not"]
    notes = [f"{WANTS}; for AutoModel, put the *.py files and auto_map of the published folder into it"]
    if "auto_map" in config:
        notes = [f"{WANTS}, and AutoModel(trust_remote_code=True), which runs the *.py files copied from init_from"]
    if not config["system_message"]:
        notes.append("its chat() begins with an empty system turn, with which this run was not trained")
    return notes
