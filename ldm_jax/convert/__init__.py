"""Conversion between published checkpoints and our parameter trees, both ways."""
