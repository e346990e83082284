"""Reads the fields of a config.json, a JSON object, and the numbers of a config dataclass among them.

A reader takes what it supports from a `ConfigFields`, which remembers the names. Whatever no reader took can then be
refused or reported, so that a config can not ask for something that the code does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sparse_mla_jax._check import require, shown

_WORDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_MAX_DEPTH = 32
_LARGEST = 2**63


def check_json(data: Any) -> None:
    """Checks what no reader can use: numbers that are not finite or longer than 64 bits, and deep nesting.

    Raises:
      ValueError: such a value; the message names its place.
    """
    waiting: list[tuple[str, Any, int]] = [("", data, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        require(
            depth <= _MAX_DEPTH,
            f"config field {_short(name)} is nested more than {_MAX_DEPTH} deep. Mend config.json.",
        )
        if isinstance(value, float):
            require(math.isfinite(value), f"config field {name} is {value}; a finite number is expected. Mend it.")
        elif isinstance(value, int):
            require(
                abs(value) < _LARGEST,
                f"config field {name} is {shown(value)}; numbers of more than 64 bits are not supported. Mend it.",
            )
        elif isinstance(value, dict):
            prefix = f"{name}." if name else ""
            waiting += [(f"{prefix}{_short(str(key))}", item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, item, depth + 1) for item in value]


def _short(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else shown(name)


def _is_same(value: Any, other: Any) -> bool:
    """Whether `value` is the JSON value `other`, and not true for 1 or 1.0 for 1. An integer may stand for a float."""
    return (type(value) is type(other) or (type(value) is int and type(other) is float)) and bool(value == other)


class ConfigFields:
    """The fields of a config.json, or of an object in it, which remembers the ones that were used.

    null counts as absent, except for the sizes of `read_sizes`.
    """

    def __init__(self, data: Mapping[str, Any], path: str = ""):
        """Wraps `data`. `path` precedes the names in messages, such as "rope_scaling."."""
        self._data, self._path = data, path
        self._used: set[str] = set()
        self._sections: dict[str, ConfigFields] = {}

    def full_name(self, name: str) -> str:
        """The name as messages print it."""
        return self._path + _short(str(name))

    def has(self, name: str) -> bool:
        """Whether the field is present and not null. Does not count as use."""
        return self._data.get(name) is not None

    def names(self) -> list[str]:
        """All names, in the order of the file."""
        return list(self._data)

    def is_null(self, name: str) -> bool:
        """Whether the field is present and null. Does not count as use."""
        return name in self._data and self._data[name] is None

    def raw(self, name: str) -> Any:
        """The value, or None if it is absent, for a reader that checks it itself."""
        self._used.add(name)
        return self._data.get(name)

    def read(self, name: str, kind: type, default: Any = None) -> Any:
        """The value as `kind` (int, float, bool, str or list), or `default` if it is absent or null.

        Raises:
          ValueError: a value of another type.
        """
        value = self.raw(name)
        if value is None:
            return default
        wanted = (int, float) if kind is float else kind
        require(
            isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)),
            f"config field {self.full_name(name)} is {shown(value)}; {_WORDS[kind]} is expected. Mend config.json.",
        )
        return kind(value)

    def read_required(self, name: str, kind: type) -> Any:
        """As `read`, for a field without a default.

        Raises:
          ValueError: a value of another type, or none.
        """
        value = self.read(name, kind)
        state = "null" if self.is_null(name) else "missing"
        require(
            value is not None,
            f"config field {self.full_name(name)} is {state}; {_WORDS[kind]} is expected. Add it to config.json.",
        )
        return value

    def read_names(self, name: str, count: int, allowed: Sequence[str]) -> list[str] | None:
        """A list with one name per layer, or None if it is absent or null.

        Raises:
          ValueError: not a list of `count` entries out of `allowed`.
        """
        values = self.read(name, list)
        if values is not None:
            wrong = [value for value in values if value not in allowed]
            require(
                not wrong,
                f"config field {self.full_name(name)} has an entry {shown(wrong[0] if wrong else None)}; supported:"
                f" {', '.join(map(repr, allowed))}. A model with other layers is not.",
            )
            require(
                len(values) == count,
                f"config field {self.full_name(name)} has {len(values)} entries; {count} are expected, one for each of"
                " num_hidden_layers. Mend config.json.",
            )
        return values

    def read_flags(self, name: str, count: int) -> list[bool]:
        """A list with 0 or 1 for each layer.

        Raises:
          ValueError: something else.
        """
        values = self.raw(name)
        require(
            isinstance(values, list) and len(values) == count and all(type(v) is int and v in (0, 1) for v in values),
            f"config field {self.full_name(name)} is no list of {count} (num_hidden_layers) zeros and ones. Mend it.",
        )
        return [value == 1 for value in values]

    def section(self, name: str, further: Mapping[str, Any] | None = None) -> ConfigFields | None:
        """The object of that name, or None if it is absent, null or empty.

        Args:
          name: of the field.
          further: what holds for the object too; its own fields take precedence.

        Raises:
          ValueError: a value that is no object.
        """
        if name not in self._sections:
            value = self.read(name, dict)
            if not value:
                return None
            self._sections[name] = ConfigFields({**(further or {}), **value}, f"{self.full_name(name)}.")
        return self._sections[name]

    def require_values(self, allowed: Mapping[str, Sequence[Any]]) -> None:
        """Requires that fields are absent, null, or have one of the values under which they change nothing.

        Raises:
          ValueError: another value; the message names the field.
        """
        for name, values in allowed.items():
            value = self.raw(name)
            require(
                value is None or any(_is_same(value, one) for one in values),
                f"config field {self.full_name(name)} is {shown(value)}; supported is only"
                f" {' or '.join(map(shown, values))}. Correct it if it misstates the weights; a model that needs it is"
                " not supported.",
            )

    def ignore(self, names: Iterable[str]) -> None:
        """Marks fields that have no effect, whatever their values."""
        self._used.update(names)

    def unused(self) -> Iterator[str]:
        """Names of the fields that were not used, without those that are null; "object.field" inside objects."""
        yield from self._own_unused()
        for section in self._sections.values():
            yield from section.unused()

    def _own_unused(self) -> Iterator[str]:
        for name, value in self._data.items():
            # Names with an underscore are bookkeeping of Hugging Face transformers.
            if name not in self._used and value is not None and not str(name).startswith("_"):
                yield self.full_name(name)

    def refuse_unused(self, reason: str) -> None:
        """Refuses the fields that were not used, without those inside objects that were.

        Raises:
          ValueError: there is one; `reason` ends the message.
        """
        name = next(self._own_unused(), None)
        require(name is None, f"config field {name} {reason}")


# --- numbers


def read_shared(kind: type, default: Any, *places: tuple[ConfigFields, str]) -> Any:
    """A number that may stand in several places, each an object and a name; `default` if it stands nowhere.

    Raises:
      ValueError: null, a value of another type, or places that differ.
    """
    given = {}
    for fields, name in places:
        if fields.has(name) or fields.is_null(name):
            given[fields.full_name(name)] = fields.read_required(name, kind)
    require(
        len(set(given.values())) <= 1,
        f"config fields {' and '.join(f'{name} {value}' for name, value in given.items())} differ; drop the wrong one.",
    )
    return next(iter(given.values()), default)


def plain_types(config_type: Any) -> dict[str, type]:
    """The published fields of a config dataclass that are numbers or truth values, with their types."""
    types = {field.name: type(field.default) for field in dataclasses.fields(config_type)}
    # quantize_index_query is an option of a run, not a property of the model.
    return {name: kind for name, kind in types.items() if kind in (int, float, bool) and name != "quantize_index_query"}


def read_sizes(
    fields: ConfigFields,
    config_type: type,
    names: Sequence[str] | None = None,
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    nulls: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dataclass's numbers and truth values that the config names.

    Args:
      fields: of a config.json.
      config_type: the dataclass; its fields have the published names.
      names: the fields that the family's config.json has; None for all.
      aliases: other names of a field. If several are given, they must agree.
      nulls: what null means, of fields in which it means something.

    Raises:
      ValueError: null elsewhere, a value of another type, or aliases that differ.
    """
    sizes = {}
    types = plain_types(config_type)
    for name in types if names is None else names:
        kind = types[name]
        found: dict[str, Any] = {}
        for spelling in (name, *(aliases or {}).get(name, ())):
            if spelling == name and fields.is_null(name):
                require(
                    name in (nulls or {}),
                    f"config field {fields.full_name(name)} is null; {_WORDS[kind]} is expected. A model without"
                    " it is not supported.",
                )
                found[spelling] = (nulls or {})[name]
            elif fields.has(spelling):
                found[spelling] = fields.read(spelling, kind)
        require(
            len(set(found.values())) <= 1,
            f"config fields {' and '.join(f'{key} {value}' for key, value in found.items())} mean the same and differ;"
            " drop one.",
        )
        if found:
            sizes[name] = next(iter(found.values()))
    return sizes


def write_sizes(config: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {name: getattr(config, name) for name in names or plain_types(type(config))}
