"""Other libraries resize by the Pillow that is installed; here they begin with the direction that
Pillow 13 begins with, as ours does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_internvl.data.processors.resize import order_of_pillow_13


@pytest.fixture(autouse=True)
def same_order() -> Iterator[None]:
    with order_of_pillow_13():
        yield
