"""What the official class of InternVL's own layout finds in a folder, and what is said of what it does not find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_internvl.data.templates import load_template
from lightning_internvl.export.official_code import conversation_fields, copy_code, official_notes

NAMES = {
    "chatml": "internvl2_5", "internvl2_5": "internvl2_5", "internvl2_5_internlm": "internvl2_5", "internlm2": "internlm2-chat",
    "Hermes-2": "Hermes-2", "phi3-chat": "phi3-chat", "internvl3_5_gpt_oss": "internvl3_5_gpt_oss", "vicuna": None,
}  # fmt: skip


@pytest.mark.parametrize(("ours", "official"), NAMES.items())
def test_chat_formats_by_their_names_in_the_official_code(ours: str, official: str | None) -> None:
    fields = conversation_fields(load_template(ours, "Be brief."))
    assert fields == ({"template": official, "system_message": "Be brief."} if official else {})


def test_code_is_copied_from_the_start_of_the_run_or_not_named(tmp_path: Path) -> None:
    base, to = tmp_path / "base", tmp_path / "to"
    base.mkdir()
    to.mkdir()
    named = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X"}
    (base / "config.json").write_text(json.dumps({"auto_map": named}))
    for name in ("configuration_x.py", "conversation.py"):
        (base / name).write_text("raise SystemExit")
    assert copy_code(to, str(base)) == copy_code(to, None) == copy_code(to, "OWNER/NAME") == {}
    assert not any(to.iterdir())
    (base / "modeling_x.py").write_text("raise SystemExit")
    assert copy_code(to, str(base)) == {"auto_map": named}
    assert sorted(file.name for file in to.iterdir()) == ["configuration_x.py", "conversation.py", "modeling_x.py"]


def test_what_loads_the_folder_is_told() -> None:
    llama = {"llm_config": {"architectures": ["LlamaForCausalLM"]}}
    (note,) = official_notes(llama)
    assert "no chat format like that of this run" in note
    whole = llama | {"template": "internvl2_5", "system_message": "Be brief.", "auto_map": {}}
    (note,) = official_notes(whole)
    assert "AutoModel(trust_remote_code=True), which runs the *.py files copied from init_from" in note
    (note,) = official_notes(whole | {"llm_config": {"architectures": ["MistralForCausalLM"]}})
    assert "no class for MistralForCausalLM" in note
