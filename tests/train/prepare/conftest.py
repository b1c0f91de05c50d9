"""Fixtures of the tests of packed and encoded data."""

from packed_folder import folder  # noqa: F401
