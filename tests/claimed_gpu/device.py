"""A GPU that is not there: tensors say `cuda:0`, obey a GPU's rules about devices and `autocast("cuda")`, and are computed on
the CPU. Every moment in which the host would wait for the device is counted, with its line.

    python tests/claimed_gpu/device.py [--xformers] [--capability 7.5] train.py debug=fast

runs a script as on such a machine, and lists the waits at its end. With `--xformers` that package's kernels load, and are the
formula; without it they are what they are here.
It finds tensors of two devices in one
operation, tensors that were never moved, types under mixed precision, and waits. It knows nothing of speed, memory, real kernels,
streams and NCCL.

How: a subclass of Tensor may claim a device that a build of PyTorch has no kernels for. `device.cpp` adds the guard of such a
device, without which autograd refuses it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
PLACE = torch.device("cuda", 0)
COMPILER = os.environ.get("CXX", "g++")
LOADED = "CLAIMED_GPU"  # a variable of processes that have the library
NUMBERS = {int, float, bool, type(None), torch.dtype, torch.device, torch.layout}
READS, LOOKS, COPIES = "read of a number", "look for places", "copy"
KINDS = {
    aten._local_scalar_dense.default: READS,
    aten.is_nonzero.default: READS,
    aten.equal.default: READS,
    aten.nonzero.default: LOOKS,
    aten.masked_select.default: LOOKS,
    aten._unique2.default: LOOKS,
    aten.unique_dim.default: LOOKS,
    aten.unique_consecutive.default: LOOKS,
    aten.repeat_interleave.Tensor: LOOKS,
    aten.bincount.default: LOOKS,
    aten.multinomial.default: "check of a draw",
}
INDEXED = (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
)
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "full", "linspace",
    "ones", "zeros", "rand", "randn", "randint", "randint.low", "randperm", "scalar_tensor", "tril_indices", "triu_indices",
)  # fmt: skip


class Gpu:
    """What is claimed, and what was seen.

    Attributes:
        capability: of the device, (9, 0) for an H100; below (8, 0) it has no bfloat16.
        memory: bytes; no tensor may have more.
        waits: how often the host waited, by kind and by the innermost line of the project.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 80 * 2**30) -> None:
        self.capability, self.memory = capability, memory
        self.name = f"Claimed GPU {capability[0]}.{capability[1]}"
        self.waits: Counter[tuple[str, str]] = Counter()

    def wait(self, kind: str) -> None:
        """Note a wait of the host."""
        self.waits[kind, _line()] += 1


_gpu = Gpu()


def _line() -> str:
    """Of the project, nearest to what is running; of a library in front of it the line too."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and file != __file__:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}{library}"
        _, inside, rest = file.partition("site-packages/")
        if not library and inside and not rest.startswith("torch/"):
            library = f" through {rest}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "autograd"


class Claimed(Tensor):
    """Says that it is on a GPU; `inner` is where its numbers are."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Claimed:
        sizes = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), **sizes, dtype=inner.dtype, device=PLACE)
        if inner.nbytes > _gpu.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {inner.nbytes} bytes")
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Claimed({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _like(self, self.inner.detach().clone()).__reduce_ex__(protocol)  # files are read on a CPU

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _like(self, Claimed(self.inner.clone()))
        return memo[id(self)]


def _like(old: Tensor, new: Tensor) -> Tensor:
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(new, old.requires_grad)
    return new.requires_grad_(old.requires_grad and old.is_leaf)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves: list[Tensor] = []
    _each(leaves.append, (args, kwargs))
    claimed = {id(x.inner): x for x in leaves if isinstance(x, Claimed)}
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else PLACE if claimed else torch.device("cpu")
    _note(func, args, kwargs, target)
    if func in (aten.copy_.default, aten._to_copy.default):
        target = target if func is aten._to_copy.default else args[0].device
    elif asked is None:
        _check_places(func, args, leaves)
    args, kwargs = _each(lambda x: x.inner if isinstance(x, Claimed) else x, (args, kwargs))
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if target.type == "cuda" else target}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    found = KERNELS.get(func, func)(*args, **kwargs)
    if target.type != "cuda":
        return found
    changes = func._schema.is_mutable
    return _each(lambda x: claimed[id(x)] if changes and id(x) in claimed else Claimed(x), found)


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Every tensor of what an operation takes or gives, changed; several times as fast as PyTorch's trees."""
    if type(value) in NUMBERS:  # most of what is asked
        return value
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_each(change, one) for one in value])
    if isinstance(value, dict):
        return {name: _each(change, one) for name, one in value.items()}
    return value


def _note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device) -> None:
    if (kind := KINDS.get(func)) and not (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None):
        _gpu.wait(kind)
    elif func in INDEXED and isinstance(args[0], Claimed):
        places = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in places):
            _gpu.wait(LOOKS)
        elif not all(isinstance(x, Claimed) for x in places):
            _gpu.wait(COPIES)
    elif func in (aten.copy_.default, aten._to_copy.default):
        source, to = (args[1], args[0].device) if func is aten.copy_.default else (args[0], target)
        quick = is_pinned(source) and (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if source.device.type != to.type and not (to.type == "cuda" and quick):
            _gpu.wait(COPIES)


def _check_places(func: Any, args: tuple[Any, ...], leaves: list[Tensor]) -> None:
    """Numbers without dimensions may come from the host, and places of an index."""
    allowed = [x for x in args[1] if x is not None] if func in INDEXED else []
    if "foreach" in func._schema.name or "fused" in func._schema.name:
        return  # counts of steps stay on the host
    for x in leaves:
        if not isinstance(x, Claimed) and x.ndim and x.device.type == "cpu" and not any(x is y for y in allowed):
            told = f"{tuple(x.shape)} {x.dtype}"
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({told}): {func}")


# --- kernels that a CPU build of PyTorch has not -------------------------------------------------------------------------


KERNELS: dict[Any, Any] = {}


# --- the device ----------------------------------------------------------------------------------------------------------


def pin_memory_of(tensor: Tensor, device: Any = None) -> Tensor:
    """A copy that the device can fetch while the host goes on."""
    made = tensor.detach().clone()
    made.untyped_storage().claimed_pinned = True
    return made


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether `pin_memory` made it or what it is a part of."""
    return not isinstance(tensor, Claimed) and getattr(tensor.untyped_storage(), "claimed_pinned", False)


def _tensor(make: Callable[..., Tensor], *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    made = make(*args, **kwargs)
    return pin_memory_of(made) if pin_memory else made


@functools.cache
def _install() -> torch.library.Library:
    """Let this build of PyTorch make such tensors; for the rest of the process."""
    kernels = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        kernels.impl(name, functools.partial(_made, getattr(getattr(aten, packet), overload or "default")), "CUDA")
    return kernels


def _made(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return Claimed(func(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))


def _pieces(gpu: Gpu) -> dict[str, Any]:
    """What `torch.cuda` says."""
    numbers = torch.zeros(16, dtype=torch.uint8)
    major, minor = gpu.capability
    about = types.SimpleNamespace(
        name=gpu.name, total_memory=gpu.memory, multi_processor_count=132, major=major, minor=minor, gcnArchName="", warp_size=32
    )
    stream = types.SimpleNamespace(
        synchronize=lambda: gpu.wait("synchronize"), wait_stream=lambda s: None, cuda_stream=0, record_event=lambda e=None: None
    )
    fixed = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": False, "_lazy_init": None, "init": None,
        "set_device": None, "get_device_name": gpu.name, "get_device_capability": gpu.capability, "get_device_properties": about,
        "empty_cache": None, "memory_stats": {}, "max_memory_allocated": 0, "memory_allocated": 0, "memory_reserved": 0,
        "max_memory_reserved": 0, "reset_peak_memory_stats": None, "reset_accumulated_memory_stats": None,
        "mem_get_info": (gpu.memory, gpu.memory), "get_rng_state": numbers, "set_rng_state": None, "get_rng_state_all": [numbers],
        "set_rng_state_all": None, "manual_seed": None, "manual_seed_all": None, "current_stream": stream,
        "is_current_stream_capturing": False, "is_bf16_supported": major >= 8,
    }  # fmt: skip
    said = {name: (lambda *_, value=value, **__: value) for name, value in fixed.items()}
    return {**said, "synchronize": lambda *_: gpu.wait("synchronize")}


@contextlib.contextmanager
def claimed_gpu(capability: tuple[int, int] = (9, 0), memory: int = 80 * 2**30) -> Iterator[Gpu]:
    """A machine with one GPU, inside."""
    global _gpu
    before, _gpu = _gpu, Gpu(capability, memory)
    _install()
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module that moves keeps its parameters, as on a GPU
    pieces = _pieces(_gpu)
    random = {name: pieces[name] for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all")}
    with contextlib.ExitStack() as stack:
        for owner, names in (
            ("torch.cuda", pieces),
            ("torch.cuda.random", random),
            ("torch.version", {"cuda": "13.0"}),
            ("torch.amp.autocast_mode", {"amp_definitely_not_available": lambda: False}),
            ("torch._C", {"_cuda_getCurrentRawStream": lambda device: 0}),  # bitsandbytes wants it when it is imported
            ("torch", {"tensor": functools.partial(_tensor, torch.tensor)}),
            ("torch.Tensor", {"pin_memory": pin_memory_of, "is_pinned": is_pinned}),
        ):
            stack.enter_context(patch.multiple(owner, **names, create=True))
        try:
            yield _gpu
        finally:
            _gpu = before
            torch.__future__.set_swap_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(lifts)


# --- processes -----------------------------------------------------------------------------------------------------------


def why_not() -> str | None:
    """What is missing here for a claimed GPU; None where nothing is."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "needs a build of PyTorch for CPUs"
    return None if shutil.which(COMPILER) else f"needs a C++ compiler ({COMPILER})"


def command(*words: str) -> list[str]:
    """`python device.py WORDS`"""
    return [sys.executable, __file__, *words]


def library() -> Path:
    """The library of `device.cpp`, built once for each version of it and each PyTorch, whose place it holds (two seconds)."""
    source, torch_home = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    version = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {torch_home}".encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"claimed-gpu-{os.getuid()}" / f"{version}.so"
    if not built.exists():
        built.parent.mkdir(mode=0o700, exist_ok=True)
        part, libraries = built.with_suffix(f".{os.getpid()}"), torch_home / "lib"
        options = (
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            f"-I{torch_home}/include",
            f"-L{libraries}",
            f"-Wl,-rpath,{libraries}",
        )
        subprocess.run([COMPILER, *options, str(source), "-o", str(part), "-lc10", "-ltorch_cpu"], check=True)
        part.replace(built)
    return built


def variables() -> dict[str, str]:
    """The environment of a process that has the library; one without begins anew with it, and imports PyTorch twice."""
    return {**os.environ, LOADED: "1", "LD_PRELOAD": str(library())}


def main() -> None:
    """Run a script as on a machine with one GPU, and say at its end where the host waited."""
    if LOADED not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], variables())
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--xformers", action="store_true")
    options.add_argument("--capability", type=lambda text: tuple(map(int, text.split("."))), default=(9, 0))
    options.add_argument("script", nargs=argparse.REMAINDER)
    given = options.parse_args()
    sys.argv = given.script
    sys.path[:0] = [str(Path(sys.argv[0]).resolve().parent), str(ROOT), str(ROOT / "tests")]
    with claimed_gpu(given.capability) as gpu, contextlib.ExitStack() as stack:
        try:
            if given.xformers:
                from formulas import kernels_load

                stack.enter_context(kernels_load("xformers"))
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            for (kind, line), times in gpu.waits.most_common():
                print(f"{times:6d}  {kind:18s} {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.modules["device"] = sys.modules["__main__"]
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    # at once: PyTorch's thread for the backward passes of the device is never ended, which now and then aborts the process
    os._exit(status if isinstance(status, int) else status is not None)
