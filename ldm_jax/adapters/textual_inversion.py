"""Textual inversion: new words of a text encoder, as functions on trees of parameters.

A word is a token `<name>` with one or more vectors in the space of the token embeddings, the only
numbers that train (Gal et al. 2022, "An Image is Worth One Word").

`read` takes the files of diffusers and stable-diffusion-webui; `added` gives a model that knows
the words; `init` and `extended` are for training; `write` gives a file for either program.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import struct, traverse_util

from ldm_jax import bundle, finite, schema, sharding
from ldm_jax.adapters.lora_parts import BASES
from ldm_jax.convert.adapters import embedding_files
from ldm_jax.data.tokens import Tokenizer
from ldm_jax.runtime import reading

Format = Literal["diffusers", "webui"]
TABLES = ("text_model/embeddings/token_embedding/embedding", "model/embed_tokens/embedding")
"""Paths of the token embeddings, of CLIP and of the BERT of latent diffusion."""
WIDTHS = BASES | {1280: "the text models of latent diffusion"}


@struct.dataclass
class Embedding:
    """A word: its token, and its vectors [n, width] float32, which take n places in a text."""

    token: str = struct.field(pytree_node=False)
    vectors: jax.Array

    def __repr__(self) -> str:
        count, width = self.vectors.shape
        return f"{self.token}, {count} vector{'s' * (count > 1)} of width {width}"


def read(
    path: epath.PathLike, model: bundle.LatentDiffusion, *, token: str | None = None
) -> Embedding:
    """The embedding in a file, for a model; its vectors are NumPy float32.

    token: its name in prompts, as "<cat>"; default: the name in the file, or the file's own.
    ValueError names the file for another text encoder (before the tensor is read), a token that
    the model knows or that would be found inside of words, and values that are not finite.
    """
    with reading.refusals(path):
        encoder = _text(model).encoder
        if token is not None:
            _check_spelling(token)
        token, tensor = embedding_files.read(path, token)
        shape = tuple(tensor.shape)
        if len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(f"{token} has the shape {list(shape)}, not vectors [n, width]")
        count, width = (1, *shape)[-2:]
        _check_width(token, width, encoder)
        if count > encoder.max_length:
            raise ValueError(
                f"{token} has {count} vectors, and a text has {encoder.max_length} tokens"
            )
        _tokenizer(model).check_names([(token, count)])
        vectors = np.asarray(tensor).astype(np.float32).reshape(count, width)
        finite.check_array(vectors, token, os.fspath(path))
        return Embedding(token, vectors)


def init(model: bundle.LatentDiffusion, token: str, init_word: str, vectors: int = 1) -> Embedding:
    """An embedding to train: all of its vectors are that of `init_word`, a word of one token.

    A word of as many tokens as there are vectors gives each its own. ValueError for a word of
    another number, and for a `token` that is not `<name>` or is known.
    """
    tokenizer = _tokenizer(model)
    with_token(tokenizer, token, vectors, _text(model).encoder.vocab_size)
    return Embedding(token, vectors_of(tokenizer, model.params["cond_stage"], init_word, vectors))


def with_token(tokenizer: Tokenizer, token: str, vectors: int, first_id: int) -> Tokenizer:
    """`tokenizer` that knows a new word, whose vectors are rows `first_id` and those after it.

    ValueError for a `token` that is not `<name>` or is known, and for numbers out of range.
    """
    _check_spelling(token)
    if not 1 <= vectors <= tokenizer.max_length:
        raise ValueError(f"{vectors} vectors: give 1 to {tokenizer.max_length}")
    return tokenizer.with_names([(token, vectors)], first_id)


def vectors_of(
    tokenizer: Tokenizer, cond_params: dict[str, Any], word: str, vectors: int
) -> np.ndarray:
    """[vectors, width] float32: those of a word of one token, repeated, or of as many tokens."""
    ids = tokenizer.ids(word)
    if len(ids) not in (1, vectors):
        raise ValueError(
            f"the word to begin with, {word!r}, is {len(ids)} tokens of the text encoder: give a"
            f" word of one token, or of as many as vectors ({vectors})"
        )
    rows = np.asarray(_table(cond_params)[1][np.asarray(ids)], np.float32)
    return np.tile(rows, (vectors // len(ids), 1))


def added(model: bundle.LatentDiffusion, embeddings: Sequence[Embedding]) -> bundle.LatentDiffusion:
    """`model` with new words: its tokenizer knows their tokens, its text encoder their vectors.

    The vectors follow the table of the token embeddings in the order given. ValueError for a token
    that the model knows, and for vectors of another width.
    """
    if not embeddings:
        return model
    encoder, tokenizer = _text(model).encoder, _tokenizer(model)
    for one in embeddings:
        _check_width(one.token, one.vectors.shape[1], encoder)
        _check_spelling(one.token)
    names = [(one.token, len(one.vectors)) for one in embeddings]
    tokenizer = tokenizer.with_names(names, encoder.vocab_size)
    vectors = np.concatenate([np.asarray(one.vectors) for one in embeddings])
    size = encoder.vocab_size + len(vectors)
    encoder = dataclasses.replace(encoder, vocab_size=size)
    cond = schema.with_text(model.config.cond, encoder=encoder)
    return dataclasses.replace(
        model,
        cond_stage=model.cond_stage.clone(vocab_size=size),
        params={**model.params, "cond_stage": _placed(model.params["cond_stage"], vectors)},
        config=dataclasses.replace(model.config, cond=cond),
        tokenizer=tokenizer,
    )


def extended(params: dict[str, Any], vectors: jax.Array) -> dict[str, Any]:
    """`params` with `vectors` [n, width] behind the token embeddings; pure, so it runs under jit.

    params: those of a model, or of its text encoder. Gradients flow to `vectors`, in whose dtype
    the table is if it has more digits than its own.
    """
    if "cond_stage" in params:
        return {**params, "cond_stage": extended(params["cond_stage"], vectors)}
    path, table = _table(params)
    flat = traverse_util.flatten_dict(params, sep="/")
    flat[path] = jnp.concatenate([table, vectors])
    for head in ("to_logits/kernel", "to_logits/bias"):  # of BERT: there, and unused
        if head in flat:
            new = jnp.zeros((*flat[head].shape[:-1], len(vectors)), flat[head].dtype)
            flat[head] = jnp.concatenate([flat[head], new], axis=-1)
    return traverse_util.unflatten_dict(flat, sep="/")


def write(path: epath.PathLike, embedding: Embedding, to: Format = "diffusers") -> None:
    """A .safetensors for diffusers ("diffusers"), or a .pt for stable-diffusion-webui ("webui").

    webui names it after the file; the token in the file is for diffusers and for `read`.
    """
    vectors = np.asarray(embedding.vectors, np.float32)
    finite.check_array(vectors, embedding.token, str(path))
    embedding_files.write(path, embedding.token, vectors, to)


def _placed(params: dict[str, Any], vectors: np.ndarray) -> dict[str, Any]:
    """`extended`, laid out by the rules of training where the table is so."""
    shapes, (_, table) = jax.eval_shape(extended, params, vectors), _table(params)
    if isinstance(table, jax.ShapeDtypeStruct):
        return shapes
    where = getattr(table, "sharding", None)
    if not isinstance(where, jax.sharding.NamedSharding):
        return extended(params, vectors)
    tree = {"cond_stage": shapes}
    rules = sharding.by_rules(tree, sharding.RULES, where.mesh)["cond_stage"]
    return jax.jit(extended, out_shardings=rules)(params, vectors)


def _table(params: dict[str, Any]) -> tuple[str, Any]:
    """(path, table of the token embeddings) in the parameters of a text encoder."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in TABLES:
        if path in flat:
            return path, flat[path]
    raise ValueError(f"no table of token embeddings among {', '.join(list(flat)[:3]) or 'nothing'}")


def _text(model: bundle.LatentDiffusion) -> schema.TextCondConfig:
    text = schema.text_of(model.config.cond)
    if text is None:
        raise ValueError("the model is not conditioned on text and takes no embeddings")
    return text


def _tokenizer(model: bundle.LatentDiffusion) -> Tokenizer:
    if not isinstance(model.tokenizer, Tokenizer):
        raise ValueError(
            "the model has no tokenizer that embeddings can be added to: give"
            " load(path, tokenizer=FOLDER) its files"
        )
    return model.tokenizer


def _check_width(what: str, width: int, encoder: Any) -> None:
    if width != encoder.width:
        kind = "CLIP" if isinstance(encoder, schema.CLIPTextConfig) else "BERT"
        theirs, ours = (f"{w} ({WIDTHS.get(w, 'no known base')})" for w in (width, encoder.width))
        raise ValueError(
            f"{what} has vectors of width {theirs}, but those of this model's text encoder"
            f" ({kind}) have {ours}: take an embedding of the same base model"
        )


def _check_spelling(token: str) -> None:
    if not embedding_files.TOKEN.fullmatch(token):
        raise ValueError(
            f"token {token!r}: would be found inside of other words; give"
            f" {embedding_files.as_token(token)!r}, or another name between < and > without blanks"
        )


__all__ = ["Embedding", "added", "extended", "init", "read", "write"]
