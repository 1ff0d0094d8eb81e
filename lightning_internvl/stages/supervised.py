"""Stage 3: the decoder answers questions about images (InternVL section 3.3, supervised
fine-tuning); and probes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.messages import check_number
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives.next_token import LABELLED, counts_of, weighs_samples
from lightning_internvl.objectives.router_balance import router_balance
from lightning_internvl.stages.base import Batch, Stage

ROUTER = "router"  # the loss that balances experts


class SupervisedStage(Stage):
    """Next-token prediction on answers; visual tokens stand at placeholders.

    Args:
        router_balance: how much the loss counts that spreads tokens over the experts of a decoder
            (see `objectives.router_balance`); 0: there is none.
        settings: of `Stage`.

    Raises:
        ValueError: for such a loss and a decoder without experts, or a weight below 0.
    """

    objectives = ("next_token",)

    def __init__(self, model: Any, *, router_balance: float = 0.0, **settings: Any) -> None:
        super().__init__(model, **settings)
        given = f"stages.{self.name}.module.router_balance"
        check_number(given, router_balance, least=0)
        self.routers: list[nn.Module] = []  # whose choices are balanced
        if router_balance:
            self.routers = getattr(model.decoder, "routers", list)()
            if not self.routers:
                raise ValueError(
                    f"{given}={router_balance} needs a decoder with experts, as decoder=qwen3_30b_a3b; this has none"
                )
            self.weights[ROUTER] = router_balance

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Next-token loss over the answers of one batch, and where it is asked for the routers', scalars."""
        with recorded(self.routers) as logits:
            hidden, labels = self.model.hidden_states(**batch)
        decoder, objective = self.model.decoder, self.model.objectives["next_token"]
        known = {"segments": batch.get("segments")} if weighs_samples(objective) else {}
        count = batch.get(COUNTS, {}).get(LABELLED)
        found = {"next_token": objective(hidden, labels, decoder.head, shifts=shifts_labels(decoder), count=count, **known)}
        if self.routers:
            if hidden.is_meta:  # a plan runs one of equal blocks, forward and backward at once
                logits = [one.detach() for one in logits]
            elif len(logits) != len(self.routers):
                fault = f"{len(logits)} of {len(self.routers)} routers could be read"
                raise RuntimeError(f"stages.{self.name}.module.router_balance: {fault}; set compile=null")
            _, mask, *_ = self.model.expand(batch["input_ids"], batch["attention_mask"], None, batch.get("pixel_values"))
            found[ROUTER] = router_balance(logits, mask, decoder.experts_of_a_token)
        return found

    def counts(self, batch: Batch) -> dict[str, float]:
        """Labelled tokens of the answers, what their loss is divided by, and tokens that are routed."""
        objective, shifts = self.model.objectives["next_token"], shifts_labels(self.model.decoder)
        found = counts_of(objective, "next_token", batch["labels"], shifts=shifts, segments=batch.get("segments"))
        return found | ({ROUTER: int(batch["attention_mask"].sum())} if self.routers else {})


@contextmanager
def recorded(routers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that takes the logits of these modules as they compute; none that are computed again for
    backward."""
    found: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda _, given, out: found.append(out[0])) for router in routers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class ProbeStage(Stage):
    """Classification by the probe that stands in the middleware's place (see
    `lightning_internvl.middleware.probe`): how much of what a picture shows can be read from the
    frozen tower's features (InternVL section 4.2)."""

    objectives = ("classification",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Classification loss of one batch, a scalar."""
        feats = self.features(batch, self.model.middleware.layers)
        return {"classification": self.model.objectives["classification"](self.model.middleware(feats), batch["labels"])}
