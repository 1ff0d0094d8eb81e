"""A plan on a terminal of 120 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from lightning_internvl.data.collate.packing import PACKED
from lightning_internvl.layers.stacked_weights import unreached
from lightning_internvl.plan.advice import advice
from lightning_internvl.plan.measure import Curve
from lightning_internvl.plan.memory import GIB, KINDS, Memory
from lightning_internvl.plan.meter import OTHER, parts_of
from lightning_internvl.plan.stage_plan import StagePlan

WIDTH = 108  # of a line of words


def stage_report(plan: StagePlan) -> Iterator[Table | str]:
    """One stage: where it runs, its parts, what trains, and whether it fits."""
    setup, batch = plan.setup, plan.batch
    total = batch * setup.devices // setup.tensor_parallel_size * plan.accumulate
    where = f"{setup.devices:,} device{'s' if setup.devices > 1 else ''} ({setup.name}{', sharded' if setup.sharded else ''})"
    times = f" x {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    what = "rows" if plan.settings.packing == PACKED else "samples"
    yield f"\n[bold]{plan.name}[/bold]: {where}, {plan.precision}, {batch} {what} a device{times}, {total:,} a step"
    memory = plan.memory()
    yield _parts_table(plan, memory)
    yield "trains: " + "; ".join(f"{rule} {_millions(count)}" for rule, count in _trained(plan).items())
    stage = plan.stage
    yield from map(in_lines, unreached(stage.model, stage.parts, stage.trained_names()))
    yield from _verdict(plan, memory)


def _parts_table(plan: StagePlan, memory: Memory) -> Table:
    table = Table(header_style="bold")
    unit, size = _unit(memory.total)
    for column in (
        "part",
        "parameters\nM",
        "trained\nM",
        "forward\nTFLOP",
        "step\nTFLOP",
        *(f"{kind}\n{unit}" for kind in KINDS),
    ):
        table.add_column(column, justify="left" if column == "part" else "right")
    rows: dict[str, list[float]] = {}
    counts = {name: list(part.parameters()) for name, part in parts_of(plan.stage.model).items()}
    for name in [*counts, OTHER]:
        parameters = counts.get(name, [])
        row = [sum(p.numel() for p in parameters) / 1e6, sum(p.numel() for p in parameters if p.requires_grad) / 1e6]
        row += [_sample(plan.measured.forward, name, plan.batch), _sample(plan.measured.training, name, plan.batch)]
        row += [memory.parts[kind][name] / size for kind in KINDS]
        group = name.partition(".")[0]
        rows[group] = [a + b for a, b in zip(rows.get(group, [0.0] * len(row)), row, strict=True)]
    for group, row in rows.items():
        table.add_row(group, *_cells(row))
    table.add_section()
    table.add_row("all", *_cells([sum(column) for column in zip(*rows.values(), strict=True)]), style="bold")
    return table


def _sample(curves: Mapping[str, Curve], name: str, batch: int) -> float:
    return curves[name](batch) / batch / 1e12 if name in curves else 0.0


def _cells(row: list[float]) -> list[str]:
    parameters, flops, memory = row[:2], row[2:4], row[4:]
    return [
        *(f"{x:,.1f}" if x else "" for x in parameters),
        *(_short(x) for x in flops),
        *(f"{x:,.1f}" if x else "" for x in memory),
    ]


def _unit(size: float) -> tuple[str, int]:
    return ("GiB", GIB) if size >= GIB else ("MiB", 2**20)


def _bytes(size: float) -> str:
    unit, factor = _unit(size)
    return f"{size / factor:,.1f} {unit}"


def _short(value: float) -> str:
    return f"{value:,.3g}" if 0 < value < 1000 else f"{value:,.0f}" if value else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 10**6 else f"{count / 1e6:.3f} M"


def _trained(plan: StagePlan) -> dict[str, int]:
    """Parameters by the rule of the stage that speaks for them."""
    found: dict[str, int] = {}
    for name, parameter in plan.stage.model.named_parameters():
        rule = plan.stage.plan.rule(name)
        if rule is not None:
            found[str(rule)] = found.get(str(rule), 0) + parameter.numel()
    return found


def _verdict(plan: StagePlan, memory: Memory) -> Iterator[Table | str]:
    needed = f"{_bytes(memory.total)} of {_bytes(plan.setup.capacity)} {plan.setup.place}"
    largest = plan.largest()
    most = f"largest micro-batch that fits: {largest:,}" if largest else f"one sample alone needs {_bytes(plan.memory(1).total)}"
    if plan.fits(memory):
        yield f"[green]fits[/green]: {needed}; {most}"
        return
    advised = list(advice(plan))
    fitting = any(plan.fits(one.memory) for one in advised)
    what = "On the command line, what fits" if fitting else "Nothing that was tried fits; what needs less"
    yield f"[red]does not fit[/red]: {needed}; {most}. {what}:"
    for one in advised:
        yield f"  {in_lines(one.words)}\n    {_bytes(one.memory.total)}; {one.price}"


def in_lines(words: str) -> str:
    """Words on lines of a terminal that can be pasted as they are."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f"{word} "
    return "\\\n    ".join(lines).rstrip()


NOTES = (
    "\nFLOPs are those of one sample (of one full row, where data is packed), a multiply-add counts as two, nothing is "
    "recomputed; a step is forward and backward. Batches are the largest that the data can give. weights: with the copies that "
    "mixed precision makes. activations: what autograd keeps, and the batch. logits: what the losses keep, and its gradient, as "
    "if every token were learnt; of one chunk, where a loss works in chunks. Not counted: fragmentation of the allocator, "
    "temporary buffers inside a block, workspace of libraries, and what sends data between devices (but the gradient buckets of "
    "ddp). Leave about a tenth free."
)
