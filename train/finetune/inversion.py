"""Textual inversion (Gal et al. 2022): texts around a new word, whose vectors alone train."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from ldm_jax import schema, sharding
from ldm_jax.adapters import textual_inversion
from ldm_jax.runtime import reading
from ldm_jax.train import frozen
from ldm_jax.train_state import TrainState

# Around the word stands what may vary between pictures, so that the vectors take up the rest.
OBJECT = (
    "{}",
    "a photo of {}",
    "a photo of a {}",
    "a photo of one {}",
    "a photo of the {}",
    "a photo of my {}",
    "a good photo of a {}",
    "a sharp photo of the {}",
    "a blurred photo of a {}",
    "a bright photo of the {}",
    "a dark photo of a {}",
    "a small photo of the {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a photo of a {} seen from near",
    "a photo of the {} seen from afar",
    "a photo of a {} in the middle",
    "a photo of a {} on the side",
    "a photo of a {} on a table",
    "a photo of a {} out of doors",
    "a picture of a {}",
    "a drawing of the {}",
    "a rendering of a {}",
    "here is a {}",
    "look at this {}",
)
STYLE = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "a drawing in the style of {}",
    "a rendering in the style of {}",
    "a large painting in the style of {}",
    "a small painting in the style of {}",
    "a bright painting in the style of {}",
    "a dark painting in the style of {}",
    "a detail of a painting in the style of {}",
    "a landscape in the style of {}",
    "a portrait in the style of {}",
    "a still life in the style of {}",
    "a street in the style of {}",
    "a house in the style of {}",
    "an animal in the style of {}",
    "a sketch in the style of {}",
    "a poster in the style of {}",
    "a work of art in the style of {}",
    "something in the style of {}",
)
TEMPLATES = {"object": OBJECT, "style": STYLE}


def texts(config: schema.AdapterTrainConfig) -> tuple[str, ...]:
    """Texts with the new word, of which every picture draws one; () for another recipe.

    ValueError names a file of texts that cannot be used.
    """
    if not isinstance(config, schema.TextualInversionTrainConfig):
        return ()
    templates = TEMPLATES[config.templates]
    if config.template_file:
        path = epath.Path(config.template_file)
        templates = tuple(x.strip() for x in reading.read_text(path).split("\n") if x.strip())
        odd = [x for x in templates if "{}" not in x]
        if odd or not templates:
            fault = f"{odd[0]!r} has no {{}} for the word" if odd else "holds no text"
            raise ValueError(f"--template-file {path}: {fault}")
    return tuple(template.replace("{}", config.token) for template in templates)


def find(config: schema.AdapterTrainConfig, given: frozen.Sources) -> tuple[Any, np.ndarray | None]:
    """(tokenizer that knows the new word, [n, width] vectors that it starts as).

    ValueError for a word that cannot be one, or that starts as none.
    """
    if not isinstance(config, schema.TextualInversionTrainConfig):
        return given.tokenizer, None
    text = schema.text_of(config.cond)
    if text is None or given.text is None or given.text.encoder is None:
        raise ValueError("the model is not conditioned on text: it has no words to learn")
    if not config.init_word:
        raise ValueError(
            "--init-word WORD is missing: a word that the vectors start as, such as the class of"
            " what the pictures show"
        )
    first_id = text.encoder.vocab_size
    known = textual_inversion.with_token(given.tokenizer, config.token, config.vectors, first_id)
    word, encoder = config.init_word, given.text.encoder
    return known, textual_inversion.vectors_of(given.tokenizer, encoder, word, config.vectors)


def begin(state: TrainState, shardings: TrainState, vectors: np.ndarray | None) -> TrainState:
    """The fresh state with the vectors of `find`; as it is without any."""
    if vectors is None:
        return state
    params = {"embedding": {"vectors": vectors}}
    return state.replace(
        params=sharding.place(params, shardings.params),
        ema_params=sharding.place({n: params[n] for n in state.ema_params}, shardings.ema_params),
    )


def widened(config: schema.AdapterTrainConfig) -> schema.AdapterTrainConfig:
    """The config of the model whose token embeddings have the new vectors behind them."""
    text = schema.text_of(config.cond)
    if not isinstance(config, schema.TextualInversionTrainConfig) or text is None:
        return config
    size = text.encoder.vocab_size + config.vectors
    encoder = dataclasses.replace(text.encoder, vocab_size=size)
    return dataclasses.replace(config, cond=schema.with_text(config.cond, encoder=encoder))
