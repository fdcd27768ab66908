"""YAML as recipes are written: 1e-4 is a number, and no key is given twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sdzoo.errors import InputError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and everyone else does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, f"expected a mapping, found {node.id}", node.start_mark)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def load_yaml(text: str) -> Any:
    """Return what ``text`` says.

    Raises:
        InputError: if it is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML lets the errors of int(), datetime() and its own slips through
        raise InputError(f"not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """Return ``values`` as YAML that :func:`load_yaml` reads back, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
