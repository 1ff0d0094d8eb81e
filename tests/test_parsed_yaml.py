"""Small helpers of reading and writing."""

from __future__ import annotations

import pytest
import yaml

from lightning_internvl.files import parsed_yaml


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 100_000, "{a: " * 100_000], ids=["lists", "dashes", "mappings"])
def test_yaml_of_any_depth_is_read_or_refused_and_never_ends_the_process(text: str) -> None:
    assert parsed_yaml("a: [1, x]") == {"a": [1, "x"]}
    with pytest.raises(yaml.YAMLError):
        parsed_yaml(text)
