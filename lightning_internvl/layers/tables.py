"""Parameters that multiply no activations: tables of words and positions, queries, tokens, scales."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


def tables(model: nn.Module) -> set[int]:
    """The `id` of each parameter that weight decay would only pull to zero.

    These are vectors and scalars, the tables of `nn.Embedding`, what a module of any depth names in
    its class attribute `never_decays` (patterns of its own names; see
    `lightning_internvl.protocols`), and, for libraries that say nothing, a tensor of no layer that
    has three dimensions or more and begins with one of size 1: the same tokens or positions for all samples.
    """
    found = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shared = parameter.ndim > 2 and parameter.shape[0] == 1 and not isinstance(module, LAYERS)
            if parameter.ndim < 2 or shared or isinstance(module, nn.Embedding):
                found.add(id(parameter))
        if said := getattr(module, "never_decays", ()):
            named = module.named_parameters()
            found |= {id(parameter) for name, parameter in named if any(fnmatchcase(name, pattern) for pattern in said)}
    return found


def word_tables(model: nn.Module) -> set[int]:
    """The `id` of each table of `nn.Embedding`."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
