"""What classes and functions take, read from their source files: nothing is imported."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning_internvl.config.targets import OURS

READABLE = (*OURS, "lightning.", "torch.")  # packages whose source files are read
# Base classes from elsewhere whose constructors take no setting.
_PLAIN = {"ABC", "Callback", "Dataset", "Exception", "Generic", "LightningModule", "Module", "Protocol", "object"}
# Classes of Lightning that pass `**kwargs` on to a class that they do not inherit from.
_PASSED_ON = {
    "lightning.pytorch.strategies.ddp.DDPStrategy": "torch.nn.parallel.distributed.DistributedDataParallel",
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger": "torch.utils.tensorboard.writer.SummaryWriter",
}


class Definition(NamedTuple):
    """A class or function with the module that holds its source."""

    module: str
    node: ast.ClassDef | ast.FunctionDef


class Signature(NamedTuple):
    """The names that a class or function takes, in order, whether it takes any other name too,
    which of them have no default, and their annotations."""

    names: tuple[str, ...]
    anything: bool
    required: tuple[str, ...] = ()
    types: Mapping[str, ast.expr] = MappingProxyType({})


def package_folder(package: str) -> Path | None:
    """The folder of a top-level package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


@functools.cache
def statements(module: str) -> Sequence[ast.stmt]:
    """The statements of a module of `READABLE`; none where there is no such module."""
    package, *rest = module.split(".")
    folder = package_folder(package) if f"{package}.".startswith(READABLE) else None
    if folder is None:
        return ()
    path = folder.joinpath(*rest)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8")).body
    return ()


def definition(
    module: str, name: str, packages: tuple[str, ...] = OURS, seen: frozenset[tuple[str, str]] = frozenset()
) -> Definition | None:
    """Where a name of a module is defined, if there or in `packages`; None for others, and for a name
    that modules import from each other in a circle, of those that were `seen` on the way."""
    if (module, name) in seen:
        return None
    seen |= {(module, name)}
    for node in statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(module, node)
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        source = node.module or ""
        for alias in node.names:
            if name == (alias.asname or alias.name) and f"{source}.".startswith(packages):
                return definition(source, alias.name, packages, seen)
    return None


@functools.cache
def signature_of(target: str) -> Signature | None:
    """What the class or function at a dotted path takes; None where its source does not tell."""
    module, _, name = target.rpartition(".")
    found = definition(module, name, READABLE)
    if found is None:
        return None
    if isinstance(found.node, ast.FunctionDef):
        return _of_function(found.node)
    return _of_class(found)


@functools.cache
def attributes_of(target: str) -> Mapping[str, Any]:
    """What a class says of itself: its class attributes with plain values, and its methods as
    True, those of base classes among them; nothing where its source does not tell."""
    module, _, name = target.rpartition(".")
    found = definition(module, name, READABLE)
    return _attributes(found) if found is not None and isinstance(found.node, ast.ClassDef) else {}


def _attributes(found: Definition) -> dict[str, Any]:
    inherited = [_attributes(base) for base in _bases(found) if not isinstance(base, str)]
    told = {name: value for base in reversed(inherited) for name, value in base.items()}
    for node in found.node.body:
        if isinstance(node, ast.FunctionDef):
            told[node.name] = True
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            with contextlib.suppress(ValueError):  # of what is computed only its module knows
                value = ast.literal_eval(node.value)
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                told |= {one.id: value for one in targets if isinstance(one, ast.Name)}
    return told


def _of_function(node: ast.FunctionDef, bound: bool = False) -> Signature:
    arguments = node.args
    places = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    named, bare = places[int(bound) :], places[int(bound) : len(places) - len(arguments.defaults)]
    words = dict(zip((a.arg for a in arguments.kwonlyargs), arguments.kw_defaults, strict=True))
    required = (*bare, *(name for name, default in words.items() if default is None))
    each = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    types = {one.arg: one.annotation for one in each if one.annotation is not None}
    return Signature((*named, *words), arguments.kwarg is not None, required, types)


def _of_class(found: Definition) -> Signature | None:
    if not isinstance(found.node, ast.ClassDef):
        return None
    own = _constructor(found.node)
    if own is not None and not own.anything:
        return own
    target = f"{found.module}.{found.node.name}"
    if target in _PASSED_ON:
        further: Signature | None = signature_of(_PASSED_ON[target])
    elif own is not None and not target.startswith(OURS):
        return own
    else:
        further = _of_bases(found)
    if own is None or further is None:
        return own or further
    inherited = [name for name in further.names if name not in {*own.names, *_handed_on(found.node)}]
    required = (name for name in further.required if name in inherited)
    types = {**further.types, **own.types}
    return Signature((*own.names, *inherited), further.anything, (*own.required, *required), types)


def _handed_on(node: ast.ClassDef) -> Iterator[str]:
    """What a class gives its base class itself, as in `super().__init__(text=False, **options)`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            yield from (word.arg for word in call.keywords if word.arg is not None)


def _constructor(node: ast.ClassDef) -> Signature | None:
    """What the `__init__` of a class takes, its own or that of a dataclass or named tuple."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return _of_function(inner, bound=True)
    decorators = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    bases = {ast.unparse(base) for base in node.bases}
    if "NamedTuple" in bases or any(ast.unparse(d).endswith("dataclass") for d in decorators):
        fields = (f.target for f in node.body if isinstance(f, ast.AnnAssign))
        names = tuple(f.id for f in fields if isinstance(f, ast.Name))
        types = {f.target.id: f.annotation for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
        return Signature(names, bool(bases - {"NamedTuple"}), types=types)
    return None


def _of_bases(found: Definition) -> Signature | None:
    """What the first base class takes that has a constructor."""
    for base in _bases(found):
        if isinstance(base, str):
            if base not in _PLAIN:
                return None
        elif (signature := _of_class(base)) is not None and signature.names:
            return signature
    return Signature((), False)


def _bases(found: Definition) -> Iterator[Definition | str]:
    """The base classes of a class of this project; those from elsewhere by their last names."""
    for base in found.node.bases if isinstance(found.node, ast.ClassDef) else ():
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        ours = definition(found.module, name) if "." not in name else None
        yield ours or name.rpartition(".")[2]
