"""Whether attention kernels of other libraries run here, found by running them: a package that is
installed may have none for this device, this type or this width of a head, or may not load at all.

Letters: H heads, G heads of keys and values, T positions, K width of a head.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from lightning_internvl.launch import is_helper
from lightning_internvl.layers import attention_kernels as kernels
from lightning_internvl.layers.attention_masks import Mask, packed, prefix

PACKAGES = {"xformers": "xformers", "flash": "flash_attn"}
INSTALL = {"xformers": "pip install xformers==0.0.35", "flash": "pip install flash-attn --no-build-isolation"}
# Rows of equal length, the same with the causal flag, pieces of uneven length.
EVEN, CAUSAL, LENGTHS = KINDS = ("even", "causal", "lengths")
TOLERANCE = 0.03  # of values from 0 to 1; the steps of bfloat16 there are 0.004
USUAL = 64  # width of a head that nearly all models have a kernel for
# What kernels and their dispatchers raise where they cannot run; what is not implemented is a
# RuntimeError too, and a version with other arguments raises TypeError.
REFUSALS = (RuntimeError, ImportError, ValueError, TypeError)
_RECOMPUTING = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
_told: set[tuple[str, str, torch.dtype, int]] = set()


def fault(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot make each kind of call that our parts make, of heads of the usual width;
    None where it can."""
    # it is used for masks alone, and without dropout
    kinds = [LENGTHS] if backend == "flex" else KINDS
    calls = ((kind, shared) for kind in kinds for shared in (False, True))
    return next(filter(None, (refusal(backend, device, dtype, USUAL, *call, False) for call in calls)), None)


@torch.compiler.assume_constant_result
def runs(backend: str, device: torch.device, dtype: torch.dtype, width: int, kind: str, shared: bool, dropped: bool) -> bool:
    """Whether a kernel takes such calls; tried at the first one, remembered afterwards. A refusal
    is told once for each type and width.

    Args:
        kind: of `KINDS`.
        shared: whether several heads of queries read the same keys and values.
        dropped: whether attention weights are dropped.
    """
    why = refusal(backend, device, dtype, width, kind, shared, dropped)
    key = (backend, device.type, dtype, width)
    if why is not None and key not in _told and not is_helper():
        _told.add(key)
        heads = f"heads of width {width} in {dtype_name(dtype)}"
        fault = f"{package_title(backend)} cannot run them here: {why}"
        print(f"attention: PyTorch's for {heads}; {fault}", file=sys.stderr)
    return why is None


@functools.cache
def refusal(
    backend: str, device: torch.device, dtype: torch.dtype, width: int, kind: str, shared: bool, dropped: bool
) -> str | None:
    """Why a kernel does not take such calls, tried on a few tokens; None where it does."""
    try:
        _load(backend)
        with _apart(device):
            sizes = (2, 1 if shared else 2, 1 if shared else 2)
            tensors = [_few(2, heads, 8, width, device=device, dtype=dtype) for heads in sizes]
            for mask in [packed([[3, 4], [5]], 8), prefix([2, 3], [6, 8], 8)] if kind == LENGTHS else [None]:
                _run(backend, tensors, mask, kind == CAUSAL, 0.5 if dropped else 0.0)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return _reason(backend, str(error) or type(error).__name__)
    return None


def _few(*sizes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers from 0 on that differ by position, so that a mask that is read otherwise shows."""
    positions = torch.linspace(0, 1, sizes[2], device=device)[:, None]
    return positions.expand(sizes).to(dtype).contiguous()


def _run(backend: str, tensors: Sequence[Tensor], mask: Mask | None, causal: bool, dropout: float) -> None:
    """One call with its gradients; raises ValueError for results that are not those of the formula."""
    q, k, v = (x.requires_grad_() for x in tensors)
    if mask is None:
        turned = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        found = kernels.EVEN[backend](*turned, causal, dropout, None).transpose(1, 2)
    elif backend == "flex":
        found = kernels.flex(q, k, v, mask, None)
    else:
        found = kernels.side_by_side(backend, q, k, v, mask, dropout, None)
    gradients = torch.autograd.grad(found.float().sum(), (q, k, v))
    # To look at values waits for the kernels: some faults show only then.
    if not all(x.isfinite().all() for x in (found, *gradients)):
        raise ValueError("what it computes is not finite")
    if not dropout and (apart := float((found.detach() - _formula(q, k, v, mask, causal)).abs().max())) > TOLERANCE:
        raise ValueError(f"what it computes is {apart:.2g} from the formula")


@torch.no_grad()
def _formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool) -> Tensor:
    """What every kernel must give, of the few tokens of a trial."""
    square = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen = (square.tril() if causal else square)[None, None] if mask is None else mask.dense(q.device)
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num() @ v


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Keep what holds for the caller, who may be in the midst of a forward pass, from what runs
    inside, and the other way round: no gradients, automatic mixed precision, random numbers, and
    recomputation, which notes what a forward pass saves."""
    with ExitStack() as contexts:
        for context in (
            torch.inference_mode(False),  # and with gradients
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            contexts.enter_context(context)
        modes = _get_current_dispatch_mode_stack()
        if any(isinstance(mode, _RECOMPUTING) for mode in modes):
            contexts.enter_context(_disable_current_modes())
            for mode in (mode for mode in modes if not isinstance(mode, _RECOMPUTING)):
                contexts.enter_context(mode)
        yield


# --- what to tell -------------------------------------------------------------------------------


def package_title(backend: str) -> str:
    """A backend's package with its version."""
    package = PACKAGES.get(backend, backend)
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} {importlib.metadata.version(package)}"
    return package


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16 ..."""
    return str(dtype).removeprefix("torch.")


def _reason(backend: str, text: str) -> str:
    """What an error says in a line: of xformers' dispatcher what each kernel lacks, of a library
    that does not load its name and the line that installs it."""
    # so it says too where its kernels do not load
    if backend == "xformers" and "build with CUDA" in text:
        text = _unloadable() or text
    lacking = dict.fromkeys(re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE))
    told = "; ".join(lacking) or textwrap.shorten(text.splitlines()[0], 200)
    if runtime := re.search(r"libcudart\.so\.(\d+)", told):
        package = "nvidia-cuda-runtime" + ("-cu12" if runtime[1] == "12" else "")
        told += f" (pip install {package})"
    return told


def _unloadable() -> str | None:
    """Why the compiled part of xformers does not load."""
    for library in _package_folder("xformers").glob("_C*.so"):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return f"its kernels do not load: {error}"
    return None


def _package_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else Path("no such package")


# --- loading ------------------------------------------------------------------------------------


@functools.cache
def _load(backend: str) -> None:
    """Import xformers without its warnings, which `_reason` tells in a line, and with the CUDA
    runtime that its wheel needs: that of version 12, which PyTorch's wheels have ceased to bring.
    It is found in the package nvidia-cuda-runtime-cu12."""
    if backend != "xformers":
        return
    # the import tells what is still missing
    with suppress(importlib.metadata.PackageNotFoundError, OSError):
        files = importlib.metadata.files("nvidia-cuda-runtime-cu12") or ()
        for file in (file for file in files if file.name == "libcudart.so.12"):
            ctypes.CDLL(str(file.locate()))
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("xformers.ops")
    finally:
        logger.setLevel(level)
