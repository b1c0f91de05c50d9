"""Prompts: texts into what a model of text is conditioned on."""
