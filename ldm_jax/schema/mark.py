"""The mark that tells execution fields from identity fields."""

from dataclasses import field
from typing import Any


def execution(default: Any) -> Any:
    """A field that may differ when a run is resumed."""
    return field(default=default, metadata={"execution": True})
