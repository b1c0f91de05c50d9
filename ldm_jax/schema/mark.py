"""Marks of fields: execution apart from identity, and those younger than exported programs."""

from dataclasses import field
from typing import Annotated, Any

from tyro.conf import arg

Path = Annotated[str, arg(metavar="PATH")]  # what --help calls the value
OptionalPath = Annotated[str | None, arg(metavar="PATH")]


def execution(default: Any) -> Any:
    """A field that may differ when a run is resumed."""
    return field(default=default, metadata={"execution": True})


def later(default: Any) -> Any:
    """A field of a model's config that was added after programs had been exported without it.

    Their hash covers every other field, so at its default this one is left out (`old_to_json`).
    """
    return field(default=default, metadata={"later": True})
