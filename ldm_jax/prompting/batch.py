"""From texts to the batch that a model of text reads."""

from collections.abc import Sequence

import numpy as np

from ldm_jax import schema
from ldm_jax.bundle import LatentDiffusion
from ldm_jax.data.tokens import Tokenizer
from ldm_jax.runtime.log import LOG


def prompts(
    model: LatentDiffusion, texts: Sequence[str], negative: str | Sequence[str] = ""
) -> dict[str, np.ndarray]:
    """{"tokens", "null_tokens"}, int32 [N, L]: the batch of N texts, for `model.encode`.

    negative: texts that guidance leads away from, one for all or as many as `texts`.
    ValueError if the model reads no text, came without a tokenizer, or the numbers differ;
    TypeError for anything but texts. The log tells of words that the text encoder has no room for.
    """
    if schema.text_of(model.config.cond) is None:
        raise ValueError("the model is not conditioned on text and reads no prompts")
    if model.tokenizer is None:
        raise ValueError(
            "the model came without a tokenizer: give load(path, tokenizer=FOLDER) a folder with"
            " its files (vocab.json and merges.txt for CLIP, vocab.txt for BERT)"
        )
    negative = [negative] * len(texts) if isinstance(negative, str) else negative
    for name, given in (("prompts", texts), ("negative", negative)):
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise TypeError(f"{name} {given!r}: give a list of texts")
    if len(negative) != len(texts):
        raise ValueError(
            f"{len(texts)} prompts and {len(negative)} negative ones: give as many, or one text"
        )
    if isinstance(model.tokenizer, Tokenizer):  # one of the user's own need not tell
        for text in dict.fromkeys([*texts, *negative]):
            lost = model.tokenizer.lost(text)
            if lost:
                LOG.warning("prompt %r... is cut off; left out: %r", text[:24], lost)
    encode = model.tokenizer.encode
    return {"tokens": encode(list(texts)), "null_tokens": encode(list(negative))}
