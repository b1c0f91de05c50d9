"""Configs as JSON and back, and the differences between two."""

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal

from ldm_jax import schema

FORMAT = 1  # of config.json; a reader refuses a newer one


def _classes() -> dict[str, type]:
    return {
        n: c for n, c in vars(schema).items() if isinstance(c, type) and dataclasses.is_dataclass(c)
    }


def to_dict(config: Any) -> Any:
    """Plain JSON values; every dataclass carries its class name under "class"."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": type(config).__name__, **fields}
    return list(config) if isinstance(config, tuple) else config


def from_dict(values: Any, where: str = "config") -> Any:
    """Inverse of `to_dict`. ValueError names an unknown or ill-typed field and its place."""
    classes = _classes()
    if not isinstance(values, dict) or values.get("class") not in classes:
        kind = values.get("class") if isinstance(values, dict) else values
        raise ValueError(f"{where}: {kind!r} is not one of {', '.join(sorted(classes))}")
    cls = classes[values["class"]]
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known - {"class"})
    if unknown:
        fields = ", ".join(sorted(known))
        raise ValueError(f"{where}: {cls.__name__} has no field {unknown[0]!r} (it has {fields})")
    return cls(**{k: typed(v, hints[k], f"{where}.{k}") for k, v in values.items() if k != "class"})


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` asks for; JSON has lists for tuples and may write 1.0 as 1.

    ValueError names `where` the value is.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        plain = [a for a in args if a is not type(None)]
        if len(plain) == 1:
            return typed(value, plain[0], where)
        if isinstance(value, dict):
            config = from_dict(value, where)
            if type(config) in plain:
                return config
        for option in plain:
            if not dataclasses.is_dataclass(option):
                try:
                    return typed(value, option, where)
                except ValueError:
                    pass
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = [args[0]] * len(value) if args[1:] == (...,) else args
            if len(inner) == len(value):
                return tuple(
                    typed(v, h, f"{where}[{i}]")
                    for i, (v, h) in enumerate(zip(value, inner, strict=True))
                )
    elif origin is dict:
        if isinstance(value, dict):
            return {k: typed(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif dataclasses.is_dataclass(hint):
        config = from_dict(value, where)
        if type(config) is hint:
            return config
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{where}: {value!r:.200} is not a {getattr(hint, '__name__', hint)}")


def to_json(config: Any, seed_bits: int = 32) -> str:
    """Text of config.json: the format number, "seed_bits" if not 32, and the config."""
    bits = {} if seed_bits == 32 else {"seed_bits": seed_bits}
    return json.dumps({"format": FORMAT, **bits, "config": to_dict(config)}, indent=2) + "\n"


def difference_from_defaults(config: Any) -> Any:
    """As `to_dict`, with only the fields that differ from their defaults.

    A field that is added later, at its default, does not change the result.
    """
    if not dataclasses.is_dataclass(config):
        return list(config) if isinstance(config, tuple) else config
    values = {"class": type(config).__name__}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        make: Any = f.default_factory
        default = f.default if make is dataclasses.MISSING else make()
        if value != default:
            values[f.name] = difference_from_defaults(value)
    return values


def old_to_json(config: Any) -> str:
    """Text of `to_json` as of November 2026: fields made with `later` left out at their default."""

    def known(config: Any, values: Any) -> Any:
        if not dataclasses.is_dataclass(config):
            return values
        fields = [
            f
            for f in dataclasses.fields(config)
            if not ("later" in f.metadata and getattr(config, f.name) == f.default)
        ]
        inner = {f.name: known(getattr(config, f.name), values[f.name]) for f in fields}
        return {"class": values["class"], **inner}

    values = known(config, to_dict(config))
    return json.dumps({"format": 1, "config": values}, indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Any:
    """Inverse of `to_json`. ValueError names a newer format, an unknown field or a wrong type."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: is damaged, not JSON ({error})") from error
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError(f"{where}: not a config written by ldm_jax (it has no format number)")
    if type(values["format"]) is not int:
        raise ValueError(f"{where}: format {values['format']!r:.40} is no number")
    if values["format"] > FORMAT:
        raise ValueError(
            f"{where}: format {values['format']} is newer than {FORMAT}; install a newer ldm_jax"
        )
    return from_dict(values["config"], f"{where}: config")


def difference(old: Any, new: Any) -> tuple[list[str], list[str]]:
    """Lines `field: old -> new` that differ, as (identity, execution)."""
    identity: list[str] = []
    changed: list[str] = []

    def walk(a: Any, b: Any, name: str, mark: bool) -> None:
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            for f in dataclasses.fields(a):
                path = f"{name}.{f.name}" if name else f.name
                walk(
                    getattr(a, f.name), getattr(b, f.name), path, mark or "execution" in f.metadata
                )
        elif a != b:
            (changed if mark else identity).append(f"{name}: {a!r} -> {b!r}")

    walk(old, new, "", False)
    return identity, changed
