"""Prompts: from texts to the conditioning of a model of text."""
