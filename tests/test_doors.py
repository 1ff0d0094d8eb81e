"""Every place of the source that builds, opens or fetches what a file names is known and says how it is gated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT

SOURCE = sorted([*(ROOT / "lightning_internvl").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), *ROOT.glob("*.py")])
# Calls by their last name, whatever they are called on,
ANYWHERE = {
    "instantiate", "get_class", "get_method", "get_object", "import_module", "__import__", "from_pretrained",
    "from_config", "get_config_dict", "hf_hub_download", "snapshot_download", "cached_file", "load_dataset", "Unpickler",
    "urlopen", "urlretrieve", "load_state_dict_from_url", "Popen", "run_path", "run_module", "spec_from_file_location",
    "get_fs_token_paths", "get_filesystem_class", "CDLL", "unsafe_load", "full_load", "get_template", "from_string",
    "load_from_checkpoint", "read_pickle", "build_opener",
}  # fmt: skip
# names of this project or of Python,
BARE = {"locate", "eval", "exec", "compile", "trusted_build", "_built"}
# and whole names.
WHOLE = {
    "torch.load", "torch.jit.load", "torch.hub.load", "dcp.load", "np.load", "numpy.load", "np.fromfile", "pickle.load",
    "pickle.loads", "marshal.loads", "joblib.load", "yaml.load", "yaml.safe_load", "OmegaConf.load", "fsspec.open",
    "subprocess.run", "subprocess.call", "subprocess.check_output", "os.system", "os.popen", "requests.get",
}  # fmt: skip

PLAIN = "safe_load makes plain values"
CONSTANT = "a name that stands in the source"
OURS = "a folder that this command has just written"
WEIGHTS_ONLY = "weights_only=True"
NO_CODE = "trust_remote_code=False"
USER = "of the user's own configuration; of a run that goes on check_run asks for host or id"
GATED = "after check_run, check_parts or check_trusted"
DOORS: dict[str, dict[str, str]] = {
    "callbacks/loggers.py": {"yaml.safe_load": PLAIN},
    "lightning_internvl/chat/limits.py": {"ctypes.CDLL": "the C library of this process"},
    "lightning_internvl/chat/requests.py": {"urllib.request.build_opener": "of an origin that the user trusts; no redirects"},
    "lightning_internvl/checkpoints/adapters/__init__.py": {"import_module": "modules of the folder, and what the user trusts"},
    "lightning_internvl/checkpoints/load_handoff.py": {"trusted_build": GATED},
    "lightning_internvl/checkpoints/torchscript.py": {"pickle.Unpickler": "names modules, which stay plain, and tensors"},
    "lightning_internvl/checkpoints/weight_files.py": {"torch.load": WEIGHTS_ONLY},
    "lightning_internvl/cli.py": {"OmegaConf.load": "plain values; check_run refuses interpolations before they are resolved"},
    "lightning_internvl/config/hf_pictures.py": {
        "hf_hub_download": "of an id that the user names; a run's interpolations are refused",
    },
    "lightning_internvl/config/targets.py": {
        "hydra.utils.instantiate": "of the user's configuration, or after check_run",
        "importlib.import_module": "of the user's configuration, or after check_run",
        "locate": "of the user's configuration, or after check_run",
    },
    "lightning_internvl/config/secrets.py": {"yaml.safe_load": PLAIN},
    "lightning_internvl/config/trust.py": {"locate": "of a name that the user trusts"},
    "lightning_internvl/data/scene_shards.py": {"yaml.safe_load": PLAIN},
    "lightning_internvl/data/shards/names.py": {
        "fsspec.get_filesystem_class": USER,
        "fsspec.get_fs_token_paths": USER,
        "fsspec.open": USER,
    },
    "lightning_internvl/data/shards/tables.py": {
        "datasets.load_dataset": USER,
        "fsspec.open": f"{USER}; pictures of records must lie here or in the data set",
    },
    "lightning_internvl/data/shards/tar.py": {"fsspec.open": USER},
    "lightning_internvl/data/templates/__init__.py": {"importlib.import_module": CONSTANT},
    "lightning_internvl/data/tokenizer.py": {"AutoTokenizer.from_pretrained": NO_CODE},
    "lightning_internvl/decoders/hf_causal.py": {
        "self.configs.from_pretrained": f"{NO_CODE}; check_no_kernels",
        "self.models.from_config": f"{NO_CODE}; check_no_kernels",
    },
    "lightning_internvl/decoders/mrope_models.py": {"kind.config.from_pretrained": "called by hf_causal.py; plain values"},
    "lightning_internvl/distributed/checkpoint_files.py": {
        "pickle.Unpickler": "names what describes tensors alone",
        "torch.load": WEIGHTS_ONLY,
    },
    "lightning_internvl/distributed/fsdp2.py": {"dcp.load": "through TensorReader", "torch.load": WEIGHTS_ONLY},
    "lightning_internvl/doctor/equivalences.py": {"_built": "of the user's configuration", "torch.load": WEIGHTS_ONLY},
    "lightning_internvl/encoders/hf_vision.py": {
        "AutoConfig.from_pretrained": f"{NO_CODE}; after model_source: no adapters' base, no kernels",
        "AutoModel.from_config": f"{NO_CODE}; check_no_kernels",
    },
    "lightning_internvl/evaluation/metrics/ptb_tokenizer.py": {"subprocess.run": "java with the file of an installed package"},
    "lightning_internvl/export/adapter.py": {"peft.peft_library().PeftModel.from_pretrained": OURS},
    "lightning_internvl/export/base_folder.py": {"yaml.safe_load": PLAIN},
    "lightning_internvl/export/engines.py": {"subprocess.run": "this Python, with a script of ours"},
    "lightning_internvl/export/older_reader.py": {"subprocess.run": "the Python of transformers4=, with a script of ours"},
    "lightning_internvl/export/read_elsewhere.py": {
        "getattr(transformers, kind).from_pretrained": f"{OURS}; {NO_CODE}",
        "transformers.AutoTokenizer.from_pretrained": f"{OURS}; {NO_CODE}",
    },
    "lightning_internvl/export/processors.py": {
        "AutoImageProcessor.from_pretrained": f"{OURS}; {NO_CODE}",
        "AutoTokenizer.from_pretrained": f"{OURS}; {NO_CODE}",
    },
    "lightning_internvl/export/sentence_transformers.py": {
        "AutoModel.from_pretrained": f"{OURS}; {NO_CODE}",
        "AutoTokenizer.from_pretrained": f"{OURS}; {NO_CODE}",
    },
    "lightning_internvl/export/reload.py": {"auto.from_pretrained": f"{OURS}; {NO_CODE}"},
    "lightning_internvl/export/run_facts.py": {"locate": "of this project or trusted"},
    "lightning_internvl/files.py": {"yaml.safe_load": PLAIN},
    "lightning_internvl/filtering/decide.py": {"np.load": "no pickles, which is its default"},
    "lightning_internvl/hub.py": {
        "AutoModelForCausalLM.from_pretrained": f"a GGUF file; {NO_CODE}",
        "AutoTokenizer.from_pretrained": f"a GGUF file; {NO_CODE}",
        "PreTrainedConfig.get_config_dict": "plain values",
        "huggingface_hub.snapshot_download": "of an id that the user names, else of the cache alone (place_faults)",
        "models.from_pretrained": f"{NO_CODE}; after model_source: no adapters' base, no kernels",
    },
    "lightning_internvl/inference/load_official.py": {"trusted_build": GATED},
    "lightning_internvl/inference/load_run.py": {"locate": GATED},
    "lightning_internvl/layers/attention_trial.py": {"ctypes.CDLL": CONSTANT, "importlib.import_module": CONSTANT},
    "lightning_internvl/layers/peft.py": {"import_module": CONSTANT},
    "lightning_internvl/middleware/qformer_init.py": {
        "BertForMaskedLM.from_pretrained": f"{NO_CODE}; after model_source: no adapters' base, no kernels",
    },
    "lightning_internvl/middleware/qllama_init.py": {"AutoConfig.from_pretrained": NO_CODE},
    "lightning_internvl/model/compose.py": {"_built": GATED, "locate": GATED},
    "lightning_internvl/reuse/key.py": {"locate": "of the user's configuration, or after check_run"},
    "lightning_internvl/stages/transplant.py": {"trusted_build": GATED},
    "lightning_internvl/stages/transplant_decoder.py": {"trusted_build": GATED},
    "lightning_internvl/training/inherit.py": {"locate": GATED, "trusted_build": GATED},
}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The watched names of a module, where they are called, handed on or inherited from."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        name = ast.unparse(node)
        last = name.rpartition(".")[2]
        if last in ANYWHERE or name in WHOLE or (isinstance(node, ast.Name) and name in BARE):
            yield name, node


def found_in(path: Path) -> set[str]:
    return {name for name, _ in calls(ast.parse(path.read_text(encoding="utf-8")))}


def test_every_door_is_known() -> None:
    found = {str(path.relative_to(ROOT)): names for path in SOURCE if (names := found_in(path))}
    assert found == {file: set(doors) for file, doors in DOORS.items()}, (
        "a call that builds, opens or fetches was added or has gone: gate it, plant a canary in "
        "tests/config/test_canaries.py, and say here how it is gated"
    )


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file)", "import_module(name)", "hydra.utils.instantiate(node)", "pickle.loads(text)", "eval(text)",
        "AutoModel.from_pretrained(x)", "class A(pickle.Unpickler): pass", "read = np.load", "yaml.load(text)",
    ],
)  # fmt: skip
def test_a_new_door_would_be_seen(line: str) -> None:
    assert list(calls(ast.parse(line)))


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_that_open_a_door_stand_in_the_source(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        if name == "torch.load":
            assert ast.unparse(given["weights_only"]) == "True"
        if name == "dcp.load":
            assert "storage_reader" in given
        for word, value in given.items():
            if word in ("trust_remote_code", "allow_pickle"):
                assert ast.unparse(value) == "False", f"{name}({word}=...)"
        if name.endswith((".from_pretrained", ".from_config")) and "PeftModel" not in name:
            text = ast.unparse(node)
            assert "trust_remote_code" in text or {"**loading", "**source", "**fields"} & set(text.rstrip(")").split(", "))
