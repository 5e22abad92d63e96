"""Strict YAML: what a setting can be, and no more."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import shown

LARGEST = 2**63 - 1  # of a whole number: what torch holds


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a float, `no` and `2001-01-01` are strings, `010` is ten.

    A key that is given twice or is no word, a reference (`*name`), nesting that no setting has, and types that JSON does
    not know are errors.
    """

    DEEPEST = 32
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None,
                None,
                f"references (*{event.anchor}) are not taken; write the value out",
                event.start_mark,
            )
        self._depth += 1
        if self._depth > self.DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "nested too deeply for a setting", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise self._error(f"a key is a word, not {shown(key)}", key_node)
            if key in seen:
                raise self._error(f"key '{key}' is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        digits = text.lstrip("+-").lstrip("0") or "0"
        if len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
            raise self._error(f"a whole number of {len(digits)} digits is too large", node)
        return -int(digits) if text.startswith("-") else int(digits)

    @staticmethod
    def _error(text: str, node: yaml.Node) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_TAG = "tag:yaml.org,2002:"
_OWN = ("bool", "float", "int", "timestamp")  # PyYAML's rules for these are YAML 1.1's
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_TAG) not in _OWN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_JSON = ("null", "bool", "float", "str", "seq", "map")
Loader.yaml_constructors = {
    **{_TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in _JSON},
    None: yaml.SafeLoader.yaml_constructors[None],  # an error that names the tag
}
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole)
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
