"""How are formats and specs written as JSON? By name and fields, from a closed list.

Reading builds nothing that is not in the list, and every field goes through the checks of its
class. There is no import by name and no evaluation."""

import base64
import dataclasses
import enum
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from quantjax.formats import Codebook, ExponentFormat, FloatFormat, IntFormat
from quantjax.formats.floating import ScaleRule, Specials
from quantjax.formats.integer import Levels
from quantjax.observers import absmax, ema, minmax, mse, percentile
from quantjax.rounding import Rounding
from quantjax.spec import Granularity, QuantSpec


class _Block:
    """Stands for a block shape: sizes and None."""


class _Values:
    """Stands for the levels of a codebook: base64 of little-endian doubles, as 256 of them in
    decimals, for a weight and its activation, would be over 1 % of a tensor of 1 MiB."""

    @staticmethod
    def to_json(values: tuple[float, ...]) -> str:
        return base64.b64encode(np.asarray(values, "<f8").tobytes()).decode()

    @staticmethod
    def from_json(data: str, where: str) -> tuple[float, ...]:
        try:
            return tuple(np.frombuffer(base64.b64decode(data, validate=True), "<f8").tolist())
        except ValueError as error:
            raise ValueError(f"{where}: expected doubles in base64: {error}") from error


# What a field may hold: plain types, enums, the two above, and names of the table below.
Kinds = tuple[Any, ...]
FORMATS: Kinds = ("IntFormat", "FloatFormat", "Codebook", "ExponentFormat")
_OBSERVERS: Kinds = ("absmax", "minmax", "ema", "percentile", "mse")
BLOCK: Kinds = (_Block,)
SPEC_OR_NONE: Kinds = ("QuantSpec", None)


class _Class(NamedTuple):
    cls: type
    make: Callable[..., Any]
    fields: dict[str, Kinds]


_CLASSES = {
    "IntFormat": _Class(
        IntFormat, IntFormat, {"bits": (int,), "signed": (bool,), "levels": (Levels,)}
    ),
    "FloatFormat": _Class(
        FloatFormat,
        FloatFormat,
        {"exponent": (int,), "mantissa": (int,), "specials": (Specials,)},
    ),
    "ExponentFormat": _Class(ExponentFormat, ExponentFormat, {"rule": (ScaleRule,)}),
    "Codebook": _Class(
        Codebook, Codebook, {"values": (_Values,), "name": (str,), "learned_bits": (int, None)}
    ),
    "absmax": _Class(type(absmax()), absmax, {}),
    "minmax": _Class(type(minmax()), minmax, {}),
    "ema": _Class(type(ema()), ema, {"decay": (float,)}),
    "percentile": _Class(type(percentile(99)), percentile, {"q": (float,)}),
    "mse": _Class(type(mse()), mse, {"p": (float,), "steps": (int,), "lowest": (float,)}),
    "QuantSpec": _Class(
        QuantSpec,
        QuantSpec,
        {
            "format": FORMATS,
            "block": (_Block, Granularity),
            "group": (int, None),
            "symmetric": (bool,),
            "observer": _OBSERVERS,
            "rounding": (Rounding,),
            "scale_format": (*FORMATS, "QuantSpec", None),
            "act": SPEC_OR_NONE,
            "static": (bool,),
            "stacked": (int,),
        },
    ),
}
_NAMES = {entry.cls: name for name, entry in _CLASSES.items()}
# Fields that came after version 1 was published: written only where they differ from the default,
# so that a file without them stays what it was.
_LATER = {"static": False}


def to_json(value: Any) -> Any:
    """A format, spec, block or one of their fields as JSON values.

    Raises ValueError for an object that is not in the list, such as an observer of the user's.

    >>> to_json(IntFormat(4))
    {'type': 'IntFormat', 'bits': 4, 'signed': True, 'levels': 'narrow'}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    name = _NAMES.get(type(value))
    if name is None:
        raise ValueError(
            f"{value!r:.80} (a {type(value).__name__}) is no format, spec or observer of quantjax, "
            "so no file can name it; "
            f"use one of {', '.join(_CLASSES)}"
        )
    result: dict[str, Any] = {"type": name}
    for field, kinds in _CLASSES[name].fields.items():
        part = getattr(value, field)
        if field in _LATER and part == _LATER[field]:
            continue
        result[field] = _Values.to_json(part) if _Values in kinds else to_json(part)
    return result


def from_json(data: Any, kinds: Kinds, where: str) -> Any:
    """The value that `to_json` wrote, if it is of one of `kinds`.

    Raises ValueError for an unknown name, for fields that are missing, unknown or of another
    type, and for values that the class refuses. A field that an older file lacks takes the
    default of its class.
    """
    for kind in kinds:
        if isinstance(kind, str) and isinstance(data, dict) and data.get("type") == kind:
            return _construct(_CLASSES[kind], data, f"{where}: {kind}")
        if kind is None and data is None:
            return None
        if kind in (bool, int, float, str) and type(data) is kind:
            return data
        if kind is _Block and isinstance(data, list) and all(map(_is_length, data)):
            return tuple(data)
        if kind is _Values and isinstance(data, str):
            return _Values.from_json(data, where)
        if _is_enum(kind):
            for member in kind:
                if data == member.value:
                    return member
    found = f"type {data['type']!r}" if isinstance(data, dict) and "type" in data else f"{data!r}"
    expected = ", ".join(_kind_name(kind) for kind in kinds)
    raise ValueError(f"{where}: expected {expected}; got {found:.80}")


def _is_length(n: Any) -> bool:
    return n is None or type(n) is int and n > 0


def _is_enum(kind: Any) -> TypeGuard[type[enum.Enum]]:
    return isinstance(kind, enum.EnumMeta)


def _kind_name(kind: Any) -> str:
    if _is_enum(kind):
        return " or ".join(repr(member.value) for member in kind)
    return kind if isinstance(kind, str) else str(getattr(kind, "__name__", kind)).lstrip("_")


def _construct(entry: _Class, data: dict[str, Any], where: str) -> Any:
    unknown = set(data) - set(entry.fields) - {"type"}
    defaults = {
        field.name
        for field in dataclasses.fields(entry.cls)
        if field.default is not dataclasses.MISSING
    }
    missing = set(entry.fields) - set(data) - defaults
    if unknown or missing:
        raise ValueError(
            f"{where}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}; a later "
            "quantjax may know them."
        )
    values = {
        name: from_json(data[name], kinds, f"{where}.{name}")
        for name, kinds in entry.fields.items()
        if name in data
    }
    try:
        return entry.make(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
