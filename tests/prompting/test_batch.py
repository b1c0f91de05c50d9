"""`ldm_jax.prompts`: what does not fit is said."""

import types

from ldm_jax import schema
from ldm_jax.data import tokens
from ldm_jax.prompting import batch


def test_words_that_do_not_fit_are_said_once(caplog):
    config = types.SimpleNamespace(cond=schema.TextCondConfig())
    tokenizer = tokens.load_tokenizer("bytes", 8)
    model = types.SimpleNamespace(config=config, tokenizer=tokenizer)
    found = batch.prompts(model, ["a red square", "a disc"], negative="a red square")
    assert found["tokens"].shape == found["null_tokens"].shape == (2, 8)
    assert caplog.messages == ["prompt 'a red square'... is cut off; left out: 'uare'"]
