"""Weights, gradients and optimizer state divided among processes: PyTorch's FSDP2 below Lightning.

What is divided, and how:

- The blocks of a part (its `sharding_units`) are gathered one by one when they run, each the next
  one's too while it works. A block is one unit, whatever of it trains: adapters of their own would
  be hundreds of small messages.
- What trains outside of the blocks (embeddings, queries, heads, the objectives' parameters) is one
  unit, gathered for the whole step, so that any method of a part may use it.
- Frozen weights outside of blocks stay whole on every device: they have neither gradient nor state,
  and would be gathered for the whole step anyway. So do parts in int8.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import parallelize_module
from torch.optim import Optimizer

from lightning_internvl.console import console
from lightning_internvl.distributed.checkpoint_files import META, TensorReader
from lightning_internvl.distributed.checkpoint_writing import Write, save
from lightning_internvl.distributed.collectives import set_data_parallel_group
from lightning_internvl.distributed.tensor_parallel import styles_of
from lightning_internvl.distributed.weight_broadcast import Spread
from lightning_internvl.layers.quantization import stays_whole
from lightning_internvl.layers.quantized_layers import Nf4Weight
from lightning_internvl.messages import check_number


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy with our sharding, and checkpoints for any number of processes.

    Args:
        data_parallel_size: processes that read samples of their own, among which weights are
            divided; "auto": all, but for `tensor_parallel_size`.
        tensor_parallel_size: processes, numbered in turn, that read the same samples and divide
            single layers among them, of the parts that say how (see
            `lightning_internvl.distributed.tensor_parallel`).
        reshard_after_forward: False keeps a block whole from its forward to its backward pass, so
            that it is gathered once a step; gradients and optimizer state are divided all the same.

    Raises:
        ValueError: for a tensor_parallel_size that is no number of processes.
    """

    lightning_module: L.LightningModule  # set before anything is saved or read

    def __init__(
        self,
        *,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        reshard_after_forward: bool = True,
    ) -> None:
        bounds = {"least": 1, "note": ", 1 divides no layers"}
        check_number("strategy.tensor_parallel_size", tensor_parallel_size, whole=True, **bounds)
        super().__init__(data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size)
        self.reshard_after_forward = reshard_after_forward
        self.tensor_parallel_size = tensor_parallel_size
        self.writers: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            count = self.num_nodes * self.num_processes
            self._data_parallel_size = count // self.tensor_parallel_size
        super().setup_environment()
        if self.tensor_parallel_size > 1:
            set_data_parallel_group(self.device_mesh["data_parallel"].get_group())

    def teardown(self) -> None:
        set_data_parallel_group(None)
        super().teardown()

    # --- sharding -------------------------------------------------------------------------------

    def shard(self, stage: L.LightningModule) -> None:
        """Divide the weights of a stage that is complete: loaded, adapted, quantised."""
        if isinstance(stage, FSDPModule):
            return
        check_weights(stage)
        parts = dict(stage.model.named_children())
        if whole := [name for name in parts if any(map(stays_whole, parts[name].modules()))]:
            note = f"int8 stays whole on every device ({', '.join(whole)}), quantization=nf4 is divided"
            console.print(f"{stage.name}: {note}; adapters are divided")
        mesh, spread = self.device_mesh["data_parallel"], Spread(stage.model, self.root_device)
        styles = styles_of(stage.model) if self.tensor_parallel_size > 1 else {}
        for units in map(units_of, stage.model.children()):
            divided: list[FSDPModule] = []
            for unit in units:
                spread.fill(unit)
                hold_packed(unit, self._policy(low=True).param_dtype)
                # in the same order in all processes
                for layer in [layer for layer in unit.modules() if layer in styles]:
                    parallelize_module(layer, self.device_mesh["tensor_parallel"], styles.pop(layer))
                again = self.reshard_after_forward
                divided.append(fully_shard(unit, mesh=mesh, mp_policy=self._policy(low=True), reshard_after_forward=again))
                if self.root_device.type == "cpu" and self.precision_plugin.precision == "bf16-mixed":
                    norms_in_float32(unit)
            prefetch(divided)
        spread.fill(stage.model)
        named = stage.model.named_parameters()
        frozen = {p for name, p in named if not stage.plan.ever_trains(name)}
        fully_shard(stage, mesh=mesh, mp_policy=self._policy(low=False), ignored_params=frozen)
        register_fsdp_forward_method(stage, "losses")
        register_fsdp_forward_method(stage, "use")
        setattr(stage, "use", resharding(stage, stage.use))  # noqa: B010 (a method)

    def _policy(self, *, low: bool) -> MixedPrecisionPolicy:
        """In bf16 blocks are gathered in bf16 and gradients summed in float32. Inputs are cast by
        autocast, not here: tables of positions, for one, must stay in float32."""
        if not str(self.precision_plugin.precision).startswith("bf16"):
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        dtype = torch.bfloat16 if low else None
        return MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    # --- checkpoint -----------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by the names of parameters, which do not depend on the number of processes."""
        named, known = self.lightning_module.named_parameters(), optimizer.state
        state = {name: known[p] for name, p in named if p in known}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"state": state, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Every process writes its share into one folder."""
        self.begin_write(checkpoint, Path(self.broadcast(str(filepath))))()

    def begin_write(self, checkpoint: dict[str, Any], path: Path) -> Write:
        """Take a copy of this process's share; it is being written into one folder until what is
        returned returns. All processes call it at the same place, with the same path."""
        tensors = {f"model/{name}": tensor for name, tensor in checkpoint.pop("state_dict").items()}
        states = checkpoint.pop("optimizer_states")
        for name, state in states[0]["state"].items():
            tensors |= {f"optimizer/{name}/{key}": value for key, value in sorted(state.items())}
        if self.is_global_zero:
            path.mkdir(parents=True, exist_ok=True)
            save(checkpoint | {"param_groups": states[0]["param_groups"]}, path / META)
        if self.writers is None:  # messages of their own, beside those of training
            self.writers = dist.new_group(backend="gloo")
        saving = dcp.async_save(tensors, checkpoint_id=path, process_group=self.writers)
        return (saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving).result

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads its share, whatever the number of those that wrote it.

        Raises:
            ValueError: if the checkpoint holds other tensors than the stage.
        """
        path, stage, optimizer = Path(checkpoint_path), self.lightning_module, self.optimizers[0]
        reader = TensorReader(path)
        known = reader.read_metadata().state_dict_metadata
        tensors = stage.checkpoint_tensors(stage.state_dict())
        model = {f"model/{name}": tensor for name, tensor in tensors.items()}
        named = dict(stage.named_parameters())
        states = [key for key in known if key.startswith("optimizer/")]
        owners = {key: key.removeprefix("optimizer/").rpartition("/")[0] for key in states}
        saved = {key for key in known if key.startswith("model/")}
        if model.keys() != saved or not set(owners.values()) <= named.keys():
            other = f"other tensors than those of stage {stage.name}"
            raise ValueError(f"{path} holds {other}; start the stage again")
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        state = {key: blank_state(known[key], named[name], groups[named[name]]) for key, name in owners.items()}
        dcp.load({**model, **state}, storage_reader=reader)
        for key, name in owners.items():
            optimizer.state[named[name]][key.rpartition("/")[2]] = state[key]
        meta = torch.load(path / META, weights_only=True)
        for group, values in zip(optimizer.param_groups, meta.pop("param_groups"), strict=True):
            group.update(values)
        return meta | {"state_dict": {key.removeprefix("model/"): x for key, x in model.items()}}


def norms_in_float32(unit: nn.Module) -> None:
    """Let norms whose weights are gathered in bf16 compute in float32, as mixed precision has it on
    a GPU; on a CPU it leaves them as they are, and they refuse weights of another type than their
    input's."""
    for module in unit.modules():
        if type(module) is nn.LayerNorm:
            forward = MethodType(_norm_in_float32, module)
            setattr(module, "forward", forward)  # noqa: B010 (a method)


def _norm_in_float32(norm: nn.LayerNorm, states: Tensor) -> Tensor:
    weight, bias = (None if x is None else x.float() for x in (norm.weight, norm.bias))
    return F.layer_norm(states.float(), norm.normalized_shape, weight, bias, norm.eps)


def check_weights(stage: L.LightningModule) -> None:
    """Refuse what FSDP2 cannot divide, before anything is divided.

    Raises:
        ValueError: naming trained weights without a dimension; a block whose trained weights are of
            several types, which cannot be summed together; and weights of a block that stand
            elsewhere too.
    """
    units = [unit for part in stage.model.children() for unit in units_of(part)]
    trained = {p: name for name, p in stage.model.named_parameters() if stage.plan.ever_trains(name)}
    if scalars := [name for p, name in trained.items() if p.ndim == 0]:
        fault = "strategy=fsdp2 cannot divide parameters without a dimension"
        raise ValueError(f"{fault}; give them the shape (1,), or use strategy=ddp: {scalars}")
    if shared := _shared(stage.model, units):
        fault = "strategy=fsdp2 cannot divide weights that a block shares with another one, or with what is outside of blocks"
        raise ValueError(f"{fault}; use strategy=ddp, or give each its own: {shared[:8]}")
    for unit in units:
        kinds = {p.dtype: trained[p] for p in unit.parameters() if p in trained}
        if len(kinds) > 1:
            told = ", ".join(f"{name} ({kind})" for kind, name in kinds.items())
            fault = f"strategy=fsdp2 cannot sum gradients of several types in one block: {told}"
            raise ValueError(f"{fault}; give them one type, or use strategy=ddp")


def _shared(model: nn.Module, units: Sequence[nn.Module]) -> list[str]:
    """The names of weights that several units hold, or one unit and what is outside of units."""
    inside = {module for unit in units for module in unit.modules()}
    outside = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    holders = Counter(p for unit in units for p in set(unit.parameters()))
    return [name for name, p in model.named_parameters() if holders[p] + (p in outside) > 1]


def units_of(part: nn.Module) -> list[nn.Module]:
    """The units of a part: its blocks that hold weights, in the order in which they run."""
    if not hasattr(part, "sharding_units") or any(map(stays_whole, part.modules())):
        return []
    return [block for block in part.sharding_units() if any(True for _ in block.parameters())]


def hold_packed(unit: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep quantised weights from the cast to the type in which a unit is gathered; None: there is
    none."""
    for layer in unit.modules():
        if dtype is not None and isinstance(layer, Nf4Weight):
            layer.hold_as(dtype)


def prefetch(units: Sequence[FSDPModule]) -> None:
    """Let each unit of a part ask for the next one's weights before it computes, so that they are
    on their way while it does. Backward, PyTorch asks for the unit that ran before by itself."""
    for unit, following in itertools.pairwise(units):
        unit.set_modules_to_forward_prefetch([following])


def resharding(stage: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, after which weights are divided again; without a backward pass they would stay
    whole."""

    def wrapped(*arguments: Any) -> Any:
        found = method(*arguments)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return found

    return wrapped


def gather_once(stage: L.LightningModule) -> None:
    """Gather each unit and divide it again, which lets it see what trains now: in which type
    gradients are summed is settled by the weights of a unit that train."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def blank_state(saved: Any, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
    """Room for a tensor of the optimizer's state: divided as the parameter, or a number."""
    if saved.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
    device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    return torch.zeros(saved.size, dtype=saved.properties.dtype, device=device)
