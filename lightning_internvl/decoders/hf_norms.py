"""RMSNorms of transformers in one kernel where states are in a lower type.

Written out, as transformers has them, they read and write a state eight times, some of these in
float32. In float32 they are left as they are, bit by bit.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_internvl.layers.basic import rms_norm


def fuse_norms(model: nn.Module) -> None:
    """Let the norms of a model that compute LLaMA's formula use one kernel; others, which add to
    the weight or norm in groups, stay."""
    for module in model.modules():
        if _is_of_llama(type(module)):
            # a bound method, so that a copy of the model gets one of its own
            setattr(module, "forward", MethodType(_forward, module))  # noqa: B010 (a method)


def _is_of_llama(kind: type[nn.Module]) -> bool:
    formula, code = LlamaRMSNorm.forward.__code__, getattr(kind.forward, "__code__", None)
    return code is not None and (code.co_code, code.co_names) == (formula.co_code, formula.co_names)


def _forward(norm: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype == torch.float32:
        return type(norm).forward(norm, hidden_states)
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
