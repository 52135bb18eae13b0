"""Keys that are given twice are refused; everything else is what PyYAML reads."""

from __future__ import annotations

import pytest
import yaml

from cloc_mllm.yaml_files import parse_yaml


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "filter: {score: 1, score: 2}", "- {x: 1}\n- {y: 1, y: 1}"])
def test_a_key_given_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="is given twice"):
        parse_yaml(text)


MERGED = """
base: &base {k: 1, l: 1}
a: {deep: &y {<<: *base, k: 2}}
z: {<<: *y, k: 3}
"""


@pytest.mark.parametrize("text", ["", "1e-4", "[1, {a: null}]", "a: {b: 1}\nc: {b: 1}", "1: a\n'1': b", MERGED])
def test_everything_else_is_as_ever(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


def test_a_key_that_is_a_list_is_not_valid() -> None:
    with pytest.raises(yaml.YAMLError, match="unhashable"):
        parse_yaml("{[1, 2]: a}")
