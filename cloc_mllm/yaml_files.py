"""YAML as people write it for this package: a key that is given twice is an error, where YAML lets the last one win."""

from __future__ import annotations

from typing import Any

import yaml


class _UniqueKeyLoader(yaml.SafeLoader):
    """Looks at keys as they are written, before merges (`<<`) add those of other mappings."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return node


def parse_yaml(text: str) -> Any:
    """Read a text of YAML as plain data.

    Raises:
        yaml.YAMLError: It is not valid YAML, or a key is given twice in one mapping.
    """
    return yaml.load(text, Loader=_UniqueKeyLoader)
