"""All runs of two processes that the tests of this folder look at, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import (
    BARE,
    BOTH_WAYS,
    LAYERS,
    LORA,
    OWN,
    QLORA,
    QUIET,
    RECOMPUTED,
    SCHEDULE,
    STOPS,
    STRATEGIES,
    TOWER_LORA,
    WHOLE_BATCH,
    hf_words,
    run_alone,
    run_pair,
    stopped_at,
    write_chats,
)


@pytest.fixture(scope="session")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process (`one`, `one_lora`, `one_schedule`) and of two (`ddp`, `fsdp2_lora`, ...)."""
    folder = tmp_path_factory.mktemp("pair")

    def alone(name: str, *settings: str) -> None:
        run_alone(*BARE, *WHOLE_BATCH, f"paths.run={folder / name}", *settings)

    def pair(name: str, *settings: str) -> dict[str, list[str]]:
        return {"train": [*BARE, f"paths.run={folder / name}", "trainer.devices=2", *settings]}

    adapters = (*QUIET, *LORA, f"init_from={folder / 'one'}")
    alone("one", *QUIET, *BOTH_WAYS)
    alone("one_lora", *adapters)
    alone("one_qlora", *QLORA)
    alone("one_schedule", *QUIET, *SCHEDULE, "strategy=fsdp2")
    alone("one_tower", *QUIET, *TOWER_LORA)
    own = (*OWN, f"init_from={folder / 'one'}", f"data.path={write_chats(folder)}")
    run_alone(*own, f"paths.run={folder / 'one_own'}")
    wrapped = hf_words(folder)
    run_alone(*wrapped, *WHOLE_BATCH, f"paths.run={folder / 'one_hf'}")
    stopped_at(2, folder / "one_schedule", folder / "one_to_two")
    jobs = [pair("fsdp2_qlora", "strategy=fsdp2", *QLORA)]
    jobs.append({"stopped_at": [3, str(folder / "fsdp2_qlora"), str(folder / "fsdp2_qlora_from_3")]})
    jobs.append({"train": [f"resume={folder / 'fsdp2_qlora_from_3'}"]})
    # The last stage, from the weights that the run of one process gave it; pictures and answers are made together.
    jobs.append(pair("layers", *LAYERS, "pipeline=[supervised]", f"init_from={folder / 'one' / 'handoff' / 'words'}"))
    for strategy in ("ddp", "fsdp2"):
        divided = ("trainer.devices=2", f"strategy={strategy}", "stages.finetune.batch_size=2")
        jobs.append({"train": [*own, f"paths.run={folder / f'{strategy}_own'}", *divided]})
    jobs.append({"train": [*wrapped, f"paths.run={folder / 'fsdp2_hf'}", "trainer.devices=2", "strategy=fsdp2"]})
    jobs += [pair(name, *QUIET, *TOWER_LORA, *way) for name, way in RECOMPUTED.items()]
    for strategy, stops in STOPS.items():
        way = STRATEGIES[strategy]
        if strategy != "layers":
            jobs.append(pair(strategy, *way, *QUIET, *BOTH_WAYS))
            jobs.append(pair(f"{strategy}_lora", *way, *adapters))
        jobs.append(pair(f"{strategy}_schedule", *way, *QUIET, *SCHEDULE))
        for step in stops:
            whole, run = folder / f"{strategy}_schedule", folder / f"{strategy}_from_{step}"
            jobs += [{"stopped_at": [step, str(whole), str(run)]}, {"train": [f"resume={run}"]}]
    jobs.append({"train": [f"resume={folder / 'one_to_two'}", "trainer.devices=2"]})
    jobs.append(
        pair("reused", *STRATEGIES["ddp"], *QUIET, *BOTH_WAYS, f"reuse={folder}", "stages.supervised.optimizer.lr=3.0e-3")
    )
    run_pair(folder, jobs)
    stopped_at(2, folder / "fsdp2_schedule", folder / "two_to_one")
    run_alone(f"resume={folder / 'two_to_one'}", "trainer.devices=1")
    return folder
