"""A plugin of mypy: what PyTorch keeps in a module under a name is not known to a type checker.

`nn.Module.__getattr__` is annotated as `Tensor | Module`, so that `self.block.norm.weight` is an
error in all code, right or wrong. Here such a name has no known type, as PyTorch itself had it up
to 1.13. Attributes that a class annotates keep their types.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType


def _unknown(context: AttributeContext) -> Type:
    """The union of `__getattr__` becomes Any; a declared attribute of nn.Module stays."""
    declared = context.default_attr_type
    return AnyType(TypeOfAny.special_form) if isinstance(declared, UnionType) else declared


class ModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _unknown if fullname.startswith("torch.nn.modules.module.Module.") else None


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return ModuleAttributes
