"""The texts' side of the stage `embed` as a folder that sentence-transformers loads: the language model
without its head, the tokens around a text, pooling, a linear layer where there is one, and length 1.

Pictures are not in it: their tower and connector have no class there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from lightning_internvl.choices import EMBEDDING
from lightning_internvl.data.collate.embedding import EmbeddingCollator
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.export import check
from lightning_internvl.export.layout_choice import TEXTS
from lightning_internvl.export.plain import make_plain
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.files import atomic_folder, read_json, write_json
from lightning_internvl.inference.embeddings import placed
from lightning_internvl.inference.load_run import LoadedRun
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.row_embeddings import embed_rows
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import EmbeddingContrast

POOLINGS = {"last": "lasttoken", "mean": "mean_tokens"}  # as all versions name them
PROBES = ("a red car", "two dogs and a tree behind them", "What does it cost?")
CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

The texts' side of a retriever that was trained by the stage `embed`. Pictures are embedded by the run that it came from.

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("FOLDER")
queries = model.encode(["a red car"], prompt_name="query")
documents = model.encode(["a car, painted red"])
```
"""


def export_texts(opened: LoadedRun, to: Path, options: ExportOptions) -> ExportReport:
    """Write the folder, load it by transformers and compare embeddings; then let it appear.

    Raises:
        ValueError: for a stage that embeds nothing or by late interaction, a language model that is
            none of transformers' own, or embeddings that differ.
    """
    model = opened.view.model.float().eval()
    pairs = _exportable(model, opened.view.pairs)
    objective: Any = model.objectives[EMBEDDING]
    make_plain(model)
    dtype = getattr(torch, options.dtype)
    for tensor in own_tensors(model).values():
        if tensor.is_floating_point():
            tensor.data.copy_(tensor.to(dtype))
    with atomic_folder(to) as draft:
        language_model = model.decoder.lm.base_model
        language_model.to(dtype).save_pretrained(draft, max_shard_size=options.max_shard_bytes)
        language_model.float()
        _write_tokenizer(draft, pairs)
        _write_modules(draft, objective, pairs)
        (draft / "README.md").write_text(CARD, encoding="utf-8")
        worst = _compared(draft, model, pairs)
    return ExportReport(
        TEXTS,
        loader=f"transformers.{type(language_model).__name__}",
        tensors=len(language_model.state_dict()),
        trained=sum(name.startswith("decoder.lm.") for name in own_tensors(model)),
        logits={"embeddings of texts": worst},
        rounding=0.0,
        processor=f"the same ids for {len(PROBES)} texts",
        skipped=[],
        writes=False,
        notes=["texts alone; pictures are embedded by the run"],
    )


def _exportable(model: VLM, pairs: Any) -> EmbeddingCollator:
    """The collator of the stage embed."""
    if not isinstance(pairs, EmbeddingCollator):
        raise ValueError(f"layout={TEXTS} is for the stage embed, and this stage embeds nothing; leave layout out")
    if model.objectives[EMBEDDING].late:
        raise ValueError(f"layout={TEXTS} holds one vector a text, and this stage embeds by late interaction; leave layout out")
    if type(model.decoder) is not HFCausalLM:
        kind = type(model.decoder).__name__
        raise ValueError(f"layout={TEXTS} holds a language model as transformers has it, not {kind}; leave layout out")
    return pairs


def _write_tokenizer(draft: Path, pairs: EmbeddingCollator) -> None:
    """The tokenizer, which puts the tokens around a text by itself."""
    tokenizer: Any = pairs.tokenizer
    around = [token for token in (_first(pairs), tokenizer.eos_token) if token is not None]
    before = [f"{token}:0" for token in around[:-1]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A:0", f"{tokenizer.eos_token}:0"],
        pair=[*before, "$A:0", "$B:0", f"{tokenizer.eos_token}:0"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in around],
    )
    tokenizer.save_pretrained(draft)
    settings = read_json(draft / "tokenizer_config.json")
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": pairs.max_length, "padding_side": "right"}
    pad = tokenizer.pad_token or tokenizer.eos_token  # which of them does not matter: masks say what is padding
    write_json(draft / "tokenizer_config.json", settings | own | {"pad_token": pad})


def _first(pairs: EmbeddingCollator) -> str | None:
    return pairs.tokenizer.bos_token if pairs.template.begins_with_bos else None


def _write_modules(draft: Path, objective: EmbeddingContrast, pairs: EmbeddingCollator) -> None:
    """What sentence-transformers makes of the last states, in the files of all its versions since 2.4."""
    projects = isinstance(objective.project, torch.nn.Linear)
    kinds = ["Transformer", "Pooling", *(["Dense"] if projects else []), "Normalize"]
    paths = ["" if place == 0 else f"{place}_{kind}" for place, kind in enumerate(kinds)]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (draft / path).mkdir()
    write_json(draft / "modules.json", modules)
    write_json(draft / "sentence_bert_config.json", {"max_seq_length": pairs.max_length, "do_lower_case": False})
    prompts = {"query": pairs.instruction, "document": ""}
    write_json(draft / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})
    width = objective.project.in_features if projects else objective.widths[EMBEDDING]
    chosen = {f"pooling_mode_{name}": name == POOLINGS[objective.pooling] for name in ("cls_token", "mean_tokens", "lasttoken")}
    write_json(draft / paths[1] / "config.json", {"word_embedding_dimension": width, **chosen, "include_prompt": True})
    if projects:
        linear: Any = objective.project
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
        write_json(draft / paths[2] / "config.json", {**sizes, "activation_function": "torch.nn.modules.linear.Identity"})
        tensors = {f"linear.{name}": tensor.contiguous() for name, tensor in linear.state_dict().items()}
        save_file(tensors, draft / paths[2] / "model.safetensors")


@torch.no_grad()
def _compared(draft: Path, model: VLM, pairs: EmbeddingCollator) -> float:
    """The largest difference of embeddings of texts by the folder, relative to the largest number; raises
    ValueError where they differ."""
    rows = pairs.texts(PROBES)
    ours = F.normalize(embed_rows(model, placed(model, rows)), dim=-1)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(draft, trust_remote_code=False)
    texts = [pairs.instruction + text for text in PROBES]
    found: Any = tokenizer(texts, padding=True, truncation=True, max_length=pairs.max_length, return_tensors="pt")
    for text, own, other in zip(PROBES, _ids(rows), _ids(found), strict=True):
        if own != other:
            raise ValueError(f"the tokenizer that was written makes other ids of {text!r}: {other} in place of {own}")
    language_model = AutoModel.from_pretrained(draft, dtype=torch.float32, trust_remote_code=False).eval()
    states = language_model(input_ids=found["input_ids"], attention_mask=found["attention_mask"])[0]
    objective: Any = model.objectives[EMBEDDING]
    theirs = F.normalize(objective.embed(states, found["attention_mask"]), dim=-1)
    return check.check_close("embeddings of texts", ours, theirs, check.ROUNDING["float32"])


def _ids(rows: Any) -> list[list[int]]:
    pairs = zip(rows["input_ids"], rows["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]
