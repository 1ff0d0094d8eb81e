"""How a compiler puts the operators of a block together, as PyTorch's Inductor does.

Assumed of it, with where it can be read:
- by data and not by the order of the program, elementwise work and sums join the kernel that makes or reads the same tensor, sums
  along rows and along columns too (`torch/_inductor/scheduler.py`, `mix_order_reduction`); nothing joins products and attention;
- a row too long to be held is read once for its sums and once with them (`online_softmax`);
- what the backward pass can find again from tensors that are kept anyway, by elementwise work between elementwise work, is not
  kept (`torch/_functorch/partitioners.py`, with `ban_recompute_materialized_backward`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

# Operators with kernels of their own, which no compiler fuses
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# Elementwise ones that are as cheap to compute again as to read
CHEAP = {"_to_copy", "add", "sub", "mul", "div", "neg", "silu", "sigmoid", "gelu", "relu", "clone", "cat", "pow", "rsqrt"}

CONSTANTS = {"fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "scalar_tensor"}


def attends(name: str) -> bool:
    """Whether an operator is an attention kernel."""
    return "attention" in name or "attn" in name


@dataclass
class Op:
    """An operator that ran: its kind, where, FLOPs, and the bytes that it reads and writes by storage. A compiler may fuse it
    with others of its region: a block, or its backward pass; with none where that is None. `long`: it sums rows too long for
    one kernel to hold."""

    name: str
    phase: str
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    region: tuple[int, str] | None = None
    long: bool = False


def found_again(ops: list[Op]) -> tuple[list[Op], set[int]]:
    """The operators as a compiler divides them between the passes, and the storages that it does not keep for the backward
    pass."""
    ops = [*ops]
    makers, users = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for place, op in enumerate(ops):
        for key in op.writes:
            makers[key].append(place)
        for key in op.reads:
            users[key].append(place)
    ends = {op.region: place for place, op in enumerate(ops)}
    # constants are written into the kernels that read them
    for place, op in enumerate(ops):
        inside = all(ops[at].region is not None for key in op.writes for at in users[key])
        if op.region is not None and not op.reads and inside and op.name in CONSTANTS:
            ops[place] = replace(op, writes={})
            for at in {at for key in op.writes for at in users[key]}:
                left = {key: size for key, size in ops[at].reads.items() if key not in op.writes}
                ops[at] = replace(ops[at], reads=left)
    later = {key: [at for at in places if ops[at].phase == "backward"] for key, places in users.items()}
    changed, dropped = [replace(op, reads=dict(op.reads)) for op in ops], set[int]()
    for op in reversed(changed):
        if op.region is None or op.phase != "forward" or op.name not in CHEAP or len(op.writes) != 1:
            continue
        (key,) = op.writes
        at = later.get(key, [])
        if key < 0 or len(makers[key]) > 1 or not at or any(changed[place].region is None for place in at):
            continue
        # what a block hands on is kept as what the next one was given
        if any(ends[op.region] < place < at[0] for place in users[key]):
            continue
        if sum(size for source, size in op.reads.items() if source >= 0 and not later.get(source)) > op.writes[key]:
            continue
        dropped.add(key)
        for place in at:
            del changed[place].reads[key]
            for source, size in op.reads.items():
                changed[place].reads[source] = max(size, changed[place].reads.get(source, 0))
                later.setdefault(source, []).append(place)
        later[key] = []
    return changed, dropped


def fused(ops: list[Op], kept: set[int]) -> Iterator[Op]:
    """The operators, those that a compiler fuses as one: what fuses waits until another kernel needs it, or its region ends.

    Args:
        kept: storages that outlive all of them, as gradients do.
    """
    plan = _Schedule(ops, kept)
    for place, op in enumerate(ops):
        if op.region is None:
            yield from plan.kernels(plan.needed(place))
            plan.done.add(place)
            yield op
        elif plan.regions[op.region][-1] == place:
            yield from plan.kernels([at for at in plan.regions[op.region] if at not in plan.done])


class _Schedule:
    """What ran, what waits, and what it waits for."""

    def __init__(self, ops: list[Op], kept: set[int]) -> None:
        self.ops, self.kept, self.done = ops, kept, set[int]()
        self.regions, self.users = defaultdict[tuple[int, str], list[int]](list), defaultdict[int, list[int]](list)
        self.needs: list[set[int]] = []
        writer, readers = dict[int, int](), defaultdict[int, list[int]](list)
        for place, op in enumerate(ops):
            if op.region is not None:
                self.regions[op.region].append(place)
            found = {writer[key] for key in (*op.reads, *op.writes) if key in writer}
            for key in op.writes:
                found.update(readers.pop(key, []))
                writer[key] = place
            for key in {*op.reads, *op.writes}:
                self.users[key].append(place)
            for key in op.reads:
                readers[key].append(place)
            self.needs.append(found - {place})

    def needed(self, place: int) -> list[int]:
        """What waits and must run before an operator."""
        found, left = set[int](), [place]
        while left:
            new = {at for at in self.needs[left.pop()] if at not in self.done and at not in found}
            found |= new
            left.extend(new)
        return sorted(found)

    def kernels(self, wanted: list[int]) -> Iterator[Op]:
        """The kernels of operators that wait: each takes along what can run with it on the same tensors."""
        while wanted:
            group = self._runnable(wanted)
            region = self.ops[group[0]].region
            waiting = [at for at in self.regions[region] if at not in self.done and at not in group] if region else []
            while joined := self._runnable(waiting, group):
                group, waiting = sorted([*group, *joined]), [at for at in waiting if at not in joined]
            self.done.update(group)
            wanted = [at for at in wanted if at not in group]
            yield self._together(group)

    def _runnable(self, places: list[int], beside: list[int] | None = None) -> list[int]:
        """Those of the operators that need nothing but what ran and each other, in one kernel; with `beside`, of those that
        share a tensor with that kernel."""
        found, whole = list[int](), set(beside or ())
        shared = {key for at in beside or () for key in (*self.ops[at].reads, *self.ops[at].writes)}
        for at in places:
            inside = self.needs[at] - self.done
            ready = inside <= whole
            if ready and (beside is None or not shared.isdisjoint((*self.ops[at].reads, *self.ops[at].writes))):
                found.append(at)
                whole.add(at)
        return found

    def _together(self, group: list[int]) -> Op:
        """One kernel instead of several: it reads what it did not make and writes what is used by others."""
        run, own = [self.ops[at] for at in group], set(group)
        made: dict[int, int] = {}
        reads: dict[int, int] = {}
        for op in run:
            reads |= {key: max(size, reads.get(key, 0)) for key, size in op.reads.items() if key not in made}
            made |= op.writes
        if any(self.ops[one].long for at in group for one in self.needs[at] & own):
            reads = {key: 2 * size for key, size in reads.items()}  # once for the sum, once with it
        written = {
            key: size
            for key, size in made.items()
            if key < 0 or key in self.kept or any(at not in own and at not in self.done for at in self.users[key])
        }
        name = "fused elementwise" if len(run) > 1 else run[0].name
        return Op(name, run[0].phase, 0.0, reads, written, run[0].region)
