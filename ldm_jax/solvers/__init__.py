"""Samplers as pairs of pure functions under one scan."""
