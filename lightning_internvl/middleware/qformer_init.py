"""A Q-Former that starts from a BERT, as BLIP-2's first stage does (Li et al. 2023, section 3.1;
LAVIS `init_Qformer`)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertForMaskedLM

from lightning_internvl.hub import model_source
from lightning_internvl.middleware.qformer_lm import QFormerLM


def start_from_bert(qformer: QFormerLM, pretrained: str) -> None:
    """Copy a BERT's weights. Queries and text both start with its feed-forward; cross-attention
    keeps its own start, and so do the words that the Q-Former has beyond the BERT's.

    Args:
        pretrained: a hub id or a local folder.

    Raises:
        ValueError: for a BERT of another size.
    """
    source = model_source(pretrained, "middleware.pretrained")
    found = BertForMaskedLM.from_pretrained(source, trust_remote_code=False)
    bert, sizes = found.bert, found.config
    own = (len(qformer.layers), qformer.embeddings.norm.weight.shape[0], qformer.layers[0].query_ffn.up.out_features)
    theirs = (sizes.num_hidden_layers, sizes.hidden_size, sizes.intermediate_size)
    if own != theirs:
        other = f"a BERT of depth, width and feed-forward {theirs}"
        raise ValueError(f"{pretrained}: {other} cannot start a Q-Former of {own}")
    _copy(bert.embeddings.LayerNorm, qformer.embeddings.norm)
    for layer, block in zip(qformer.layers, bert.encoder.layer, strict=True):
        attention = block.attention.self
        for here, there in (
            (layer.self_attn.q_proj, attention.query), (layer.self_attn.k_proj, attention.key),
            (layer.self_attn.v_proj, attention.value), (layer.self_attn.o_proj, block.attention.output.dense),
            (layer.self_attn.norm, block.attention.output.LayerNorm),
        ):  # fmt: skip
            _copy(there, here)
        for ffn in filter(None, (layer.query_ffn, layer.text_ffn)):
            for here, there in (
                (ffn.up, block.intermediate.dense),
                (ffn.down, block.output.dense),
                (ffn.norm, block.output.LayerNorm),
            ):
                _copy(there, here)
    if hasattr(qformer.embeddings, "words"):
        _copy(bert.embeddings.word_embeddings, qformer.embeddings.words)
        _copy(bert.embeddings.position_embeddings, qformer.embeddings.positions)
    if qformer.head is not None:
        _copy(found.cls.predictions.transform.dense, qformer.head.dense)
        _copy(found.cls.predictions.transform.LayerNorm, qformer.head.norm)
        with torch.no_grad():
            qformer.head.bias[: sizes.vocab_size] = found.cls.predictions.bias


@torch.no_grad()
def _copy(there: nn.Module, here: nn.Module) -> None:
    """Weight and bias; of a table the rows that both have."""
    for name, tensor in there.named_parameters(recurse=False):
        rows = min(len(tensor), len(getattr(here, name)))
        getattr(here, name)[:rows] = tensor[:rows]
