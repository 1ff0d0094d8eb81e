"""A plugin of mypy: what PyTorch keeps in a module under a name is not known to a type checker, nor
is whose hooks Lightning calls.

`nn.Module.__getattr__` is annotated as `Tensor | Module`, so that `self.block.norm.weight` is an
error in all code, right or wrong. Here such a name has no known type, as PyTorch itself had it up
to 1.13. Attributes that a class annotates keep their types.

Lightning's callbacks get a `LightningModule` as `pl_module`; ours get the stage that is trained. A
hook may name it so, and what it does with the stage is checked.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import FuncDef
from mypy.plugin import AttributeContext, ClassDefContext, Plugin
from mypy.types import AnyType, CallableType, Type, TypeOfAny, UnionType

CALLBACK = "lightning.pytorch.callbacks.callback.Callback"


def _unknown(context: AttributeContext) -> Type:
    """The union of `__getattr__` becomes Any; a declared attribute of nn.Module stays."""
    declared = context.default_attr_type
    return AnyType(TypeOfAny.special_form) if isinstance(declared, UnionType) else declared


def _any_module(context: ClassDefContext) -> None:
    """Let the hooks of Lightning's callbacks take any `pl_module`."""
    base = next(one for one in context.cls.info.mro if one.fullname == CALLBACK)
    for symbol in base.names.values():
        if isinstance(hook := symbol.node, FuncDef) and isinstance(hook.type, CallableType):
            for place, name in enumerate(hook.type.arg_names):
                if name == "pl_module":
                    hook.type.arg_types[place] = AnyType(TypeOfAny.special_form)


class ModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _unknown if fullname.startswith("torch.nn.modules.module.Module.") else None

    def get_base_class_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        return _any_module if fullname == CALLBACK else None


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return ModuleAttributes
