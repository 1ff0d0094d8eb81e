"""Files that come with a folder, each with a canary in it: code that would make a file or fetch something. None runs.

Classes that run configurations and manifests name are in `test_trust.py`; the places of the source are listed in `test_doors.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import ROOT, TINY, call, once, read_json, tiny_run, train

from lightning_internvl.data.shards.tables import HfShards
from lightning_internvl.data.tokenizer import hf_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.hf_vision import HFVision
from lightning_internvl.filtering.decide import Columns
from lightning_internvl.middleware.qformer_init import start_from_bert
from lightning_internvl.model.feature_stores import DiskStore

TWO_STAGES = ("pipeline=[contrastive,supervised]", "callbacks.report=null", "callbacks.samples=null")
SAVED = "lightning_internvl.data.tokenizer.saved_tokenizer"
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 32,
}  # fmt: skip
KERNEL = "owner/kernel"


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, ran: Path) -> None:
        self.ran = str(ran)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.ran,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with a model that answers."""
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", *TWO_STAGES)


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    """The run as a folder for others."""
    outcome = call("export.py", f"run={finished}", f"to={finished.parent / 'exported'}", "layout=handoff")
    assert outcome.code == 0, outcome.err
    return finished.parent / "exported"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a canary makes; the module `planted` is one, and lies in each folder beside what names it."""
    text = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\ndef build(*_, **__): return 1\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "the canary ran"
    assert "planted" not in sys.modules
    sys.modules.pop("planted", None)


def add(file: Path, **fields: Any) -> None:
    """Fields in a JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps((read_json(file) if file.is_file() else {}) | fields))


def plant_code(folder: Path, ran: Path) -> None:
    """The module, where code that comes with a model lies."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ran.parent / "code" / "planted.py", folder)


def plant_tokenizer(folder: Path, ran: Path) -> None:
    plant_code(folder, ran)
    add(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.build", None]}, tokenizer_class="Planted")


def plant_processor(folder: Path, ran: Path) -> None:
    add(folder / "processor.json", _target_="planted.build")


def plant_image_class(folder: Path, ran: Path) -> None:
    plant_code(folder, ran)
    names = {"AutoImageProcessor": "planted.build", "AutoProcessor": "planted.build"}
    add(folder / "preprocessor_config.json", auto_map=names, image_processor_type="Planted", processor_class="Planted")
    add(folder / "processor_config.json", auto_map=names, processor_class="Planted")


def plant_template(folder: Path, ran: Path) -> None:
    text = "{{ cycler.__init__.__globals__.os.mkdir('RAN') }}"
    (folder / "chat_template.jinja").write_text(text.replace("RAN", str(ran)))


def plant_generation(folder: Path, ran: Path) -> None:
    plant_code(folder / "custom_generate", ran)
    (folder / "custom_generate" / "generate.py").write_text((folder / "custom_generate" / "planted.py").read_text())
    add(folder / "generation_config.json", custom_generate="owner/name")


PLANTS: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    "tokenizer": (plant_tokenizer, 2),
    "processor": (plant_processor, 2),
    "image class": (plant_image_class, 0),  # nothing reads it
    "chat template": (plant_template, 2),
    "generation": (plant_generation, 0),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_model_folder(name: str, model: Path, ran: Path, tmp_path: Path) -> None:
    plant, code = PLANTS[name]
    plant(model, ran)
    records = [{"image": str(ROOT / "docs" / "film.png"), "caption": f"a page, {i}"} for i in range(4)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    tuned = ("experiment=finetune", f"init_from={model}", f"data.path={tmp_path / 'captions.jsonl'}", "data.validation=null")
    for script, *words in (
        ("chat.py", f"model={model}", "question=hi"),
        ("evaluate.py", f"model={model}", "task=vqa", "samples=2", f"to={tmp_path / 'scores'}"),
        ("train.py", *tuned, "debug=fast", f"paths.run={tmp_path / 'tuned'}"),
    ):
        outcome = call(script, *words)
        assert outcome.code == code, f"{script}: {outcome.err}"
        if name == "processor":
            assert "'planted.build'" in outcome.err
            assert "trust=[planted]" in outcome.err


def test_the_tokenizer_of_a_hand_off(run: Path, ran: Path) -> None:
    handoff = run / "handoff" / "supervised"
    manifest = read_json(handoff / "manifest.json")
    manifest["config"]["decoder"]["tokenizer"] = {"_target_": SAVED}
    add(handoff / "manifest.json", **manifest)
    plant_tokenizer(handoff / "tokenizers" / "decoder", ran)
    for words in (("chat.py", f"run={run}", "question=hi"), ("export.py", f"run={handoff}", f"to={run / 'out'}")):
        assert call(*words).code == 2


@pytest.mark.parametrize("part", ["encoder", "middleware"])
def test_the_parts_of_a_transplant(part: str, run: Path, ran: Path, tmp_path: Path) -> None:
    """A tower that another run brings, and the connector of the model that gets it."""
    planted = Path(shutil.copytree(run, tmp_path / "planted"))
    manifest = read_json(planted / "handoff" / "supervised" / "manifest.json")
    manifest["config"][part] = {"_target_": "planted.build"}
    add(planted / "handoff" / "supervised" / "manifest.json", **manifest)
    old, new = (run, planted) if part == "encoder" else (planted, run)
    outcome = train("experiment=transplant", f"init_from={old}", f"encoder.pretrained={new}", "data=scenes", "data.image_size=48")
    assert outcome.code == 2
    assert "planted.build" in outcome.err


@pytest.mark.parametrize("door", ["chat.py question=hi", "evaluate.py", "export.py to={}", "train.py", "train.py --multirun"])
def test_a_python_tag_in_a_run_configuration(door: str, run: Path, ran: Path, tmp_path: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"planted: !!python/object/apply:os.mkdir [{str(ran)!r}]\n")
    script, *words = door.format(tmp_path / "out").split()
    opening = (f"run={run}",) if script != "train.py" else (f"resume={run}",)
    if "--multirun" in words:
        opening = (*TINY, *TWO_STAGES[:1], f"init_from={run}", f"paths.sweep={tmp_path / 'sweep'}")
    outcome = call(script, *words, *opening)
    assert outcome.code == 2
    assert "python/object/apply:os.mkdir" in outcome.err


def test_a_sweep_starts_from_no_run_with_foreign_code(run: Path, ran: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["callbacks"]["planted"] = {"_target_": "planted.build"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    start = ("--multirun", "seed=0,1", *TINY, "pipeline=[supervised]", f"init_from={run}")
    outcome = train(*start, f"paths.sweep={tmp_path / 'sweep'}")
    assert outcome.code == 2
    assert "trust=[planted]" in outcome.err


@pytest.mark.parametrize("node", ["held_out", "task", "inside a processor"])
def test_a_data_set_of_the_hub_where_none_is_read(node: str, run: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    reads = {"_target_": "lightning_internvl.data.shards.tables.HfShards", "path": "owner/name"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    if node == "held_out":
        config["data"]["held_out"] = reads
    elif node == "task":
        config["stages"]["supervised"]["evaluation"] = {"mine": reads}
    else:
        config["data"]["processor"]["image_size"] = reads
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for words in (
        ("chat.py", f"run={run}", "question=hi"),
        ("evaluate.py", f"run={run}"),
        ("export.py", f"run={run}", f"to={run}/x"),
    ):
        outcome = call(*words)
        assert outcome.code == 2, words
        assert "HfShards" in outcome.err


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("data.pairs", {"_target_": "lightning_internvl.data.shards.tables.HfShards", "path": "owner/name"}, "owner/name"),
        ("data.pairs.styles", ["s3://bucket/{000..009}.tar"], "s3://bucket"),
        ("logger.history.path", "https://me:secret@example.org/a", "https://example.org"),
        ("data.processor", {"_target_": SAVED, "folder": "owner/name"}, "owner/name"),
    ],
)
def test_a_run_that_goes_on_asks_no_place_that_it_names_itself(path: str, value: Any, named: str, run: Path, ran: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    node = config
    *parents, last = path.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = train(f"resume={run}")
    assert outcome.code == 2
    assert f"trust=[{named}]" in outcome.err
    assert "secret" not in outcome.err
    trusted = train(f"resume={run}", f"trust=[{named}]")  # what else is wrong with it is told then
    assert f"trust=[{named}]" not in trusted.err


def test_the_checkpoint_of_a_run_that_goes_on(run: Path, ran: Path) -> None:
    shutil.rmtree(run / "handoff" / "supervised")
    checkpoint = run / "checkpoints" / "supervised" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": 2, "state_dict": {}, "planted": Canary(ran)}, checkpoint)
    outcome = train(f"resume={run}")
    assert outcome.code == 2
    assert "last.ckpt is damaged" in outcome.err


def test_an_earlier_attempt_of_a_job(run: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["callbacks"]["planted"] = {"_target_": "planted.build"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name, value in {"ID": "7", "NAME": "train", "START_TIME": "2", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}".replace("JOB_RESTART", "RESTART"), value)
    words = [*TINY, *TWO_STAGES, f"paths.run={tmp_path / 'new'}"]
    (run / "launch.json").write_text(json.dumps({"launches": {"SLURM job 7": "0 at 1"}, "command": once(*words)}))
    outcome = train(*words)
    assert outcome.code == 2, outcome.out
    assert "SLURM job 7 was started again" in outcome.out.replace("\n", " ")
    assert "trust=[planted]" in outcome.err


def test_records_of_an_evaluation(run: Path, ran: Path) -> None:
    folder = run / "evaluation" / "vqa"
    node = {"_target_": "planted.build"}
    add(folder / "record.json", task="vqa", settings=node, model=node)
    (folder / "predictions.jsonl").write_text(json.dumps({"key": "scenes/0", "answer": node, "_target_": "planted.build"}) + "\n")
    outcome = call("evaluate.py", f"run={run}", "task=vqa", "samples=2")
    assert outcome.code == 0, outcome.err


def test_columns_of_a_filter(ran: Path, tmp_path: Path) -> None:
    objects = np.array([Canary(ran)], dtype=object)
    for name in ("starts.npy", "000000.npy"):
        np.save(tmp_path / name, objects, allow_pickle=True)
        with pytest.raises(ValueError, match="allow_pickle=False"):
            Columns(tmp_path) if name == "starts.npy" else Columns.join(tmp_path, 1)


def test_a_feature_cache(ran: Path, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "features", 2**20)
    store.put("a", [torch.ones(2)])
    (file,) = [path for path in (tmp_path / "features").rglob("*") if path.is_file()]
    torch.save({"0": Canary(ran)}, file)
    assert store.get("a") is None


@pytest.mark.parametrize("fields", [{"attn_implementation": KERNEL}, {"text_config": {"_attn_implementation": KERNEL}}])
def test_a_kernel_of_the_hub(fields: dict[str, Any], ran: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"'{KERNEL}' is code of the hub, which is not run"):
        HFCausalLM(config=LLAMA | fields)
    HFCausalLM(config=LLAMA).lm.save_pretrained(tmp_path / "llama")
    add(tmp_path / "llama" / "config.json", **fields)
    for device in ("cpu", "meta"):
        with torch.device(device), pytest.raises(ValueError, match=rf"'{KERNEL}' is code of the hub"):
            HFCausalLM(pretrained=str(tmp_path / "llama"))


def test_code_and_adapters_in_a_folder_of_weights(ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    HFCausalLM(config=LLAMA).lm.save_pretrained(folder)
    plant_tokenizer(folder, ran)
    add(folder / "config.json", auto_map={"AutoModelForCausalLM": "planted.build", "AutoConfig": "planted.build"})
    HFCausalLM(pretrained=str(folder))
    with pytest.raises((ValueError, OSError, KeyError)):
        hf_tokenizer(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save({"planted": Canary(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickles with more than tensors"):
        HFCausalLM(pretrained=str(folder))
    add(folder / "adapter_config.json", base_model_name_or_path="owner/base", peft_type="LORA")
    with pytest.raises(ValueError, match="holds adapters, no whole model"):
        HFCausalLM(pretrained=str(folder))
    with pytest.raises(ValueError, match="holds adapters, no whole model"):
        start_from_bert(None, str(folder))


def test_a_bare_file_of_weights(ran: Path, tmp_path: Path) -> None:
    torch.save({"planted": Canary(ran)}, tmp_path / "model.pth")
    outcome = call("chat.py", f"model={tmp_path / 'model.pth'}", "question=hi")
    assert outcome.code == 2
    assert "model.pth is refused" in outcome.err


def test_a_picture_that_a_record_names(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": {"bytes": None, "path": "https://example.org/a.png"}, "caption": "a"}))
    monkeypatch.setattr("fsspec.open", lambda *_, **__: pytest.fail("a URL was asked"))
    shards = HfShards("json", data_files=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"names a picture at https://example\.org/a\.png, which is not fetched"):
        list(shards.read(0))


def test_a_kernel_for_a_tower_of_transformers(ran: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {"model_type": "dinov2", "image_size": 28, "patch_size": 14, **sizes}
    with pytest.raises(ValueError, match=rf"'{KERNEL}' is code of the hub"):
        HFVision(config=fields | {"attn_implementation": KERNEL})
    add(tmp_path / "tower" / "config.json", **fields, auto_map={"AutoConfig": "planted.build", "AutoModel": "planted.build"})
    plant_code(tmp_path / "tower", ran)
    with pytest.raises(ValueError, match=r"encoder\.pretrained"):
        HFVision(pretrained=str(tmp_path / "tower"))  # without weights
    add(tmp_path / "tower" / "config.json", attn_implementation=KERNEL)
    with pytest.raises(ValueError, match=rf"'{KERNEL}' is code of the hub"):
        HFVision(pretrained=str(tmp_path / "tower"))
