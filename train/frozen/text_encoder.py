"""The text side of a run: its tokenizer, and an encoder that does not train, kept in the run."""

import string
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import loading, schema, sharding
from ldm_jax.data import tokens
from ldm_jax.runtime import rundir
from ldm_jax.schema import serialize

# Texts that tell tokenizers apart: equal ids for all of them count as the same tokenizer.
PROBE = ["", "A Red disc, 3 corners; größer", string.printable]


class Text(NamedTuple):
    """Tokenizer and text encoder of a run with captions."""

    tokenizer: Any
    encoder: dict | None
    """Host parameters of a frozen encoder; None where it trains."""


def trains(cond: schema.CondConfig) -> bool:
    """True if the conditioning has a learned part and it trains with the UNet."""
    text = schema.text_of(cond)
    return text is None or text.trainable


def find(config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike) -> Text | None:
    """Tokenizer and frozen encoder from `frozen/`, at the first start from the paths of `cond`.

    None without text. Only reads. ValueError names what is missing or does not fit, or a new path
    that leads to another encoder or tokenizer than those that the run was trained with.
    """
    text = schema.text_of(config.cond)
    if text is None:
        return None
    flag = "--cond.text" if isinstance(config.cond, schema.HybridCondConfig) else "--cond"
    before = _text_before(workdir)
    source = text.path or config.init_from
    encoder, beside = (None, None)
    if not text.trainable:
        encoder, beside = _encoder(text, source, workdir, before, flag)
    tokenizer = _tokenizer(text, workdir, before, flag) or beside
    if tokenizer is None and config.init_from:
        tokenizer = loading.load_text_encoder(config.init_from, text.encoder.max_length)[2]
    if tokenizer is None:
        raise ValueError(
            f'no tokenizer: give {flag}.tokenizer, a folder with tokenizer files or "bytes"'
        )
    if tokenizer.vocab_size > text.encoder.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text encoder only"
            f" {text.encoder.vocab_size}: set {flag}.encoder.vocab-size {tokenizer.vocab_size}, or"
            f" take another tokenizer by {flag}.tokenizer"
        )
    return Text(tokenizer, encoder)


def prepare(
    config: schema.LatentDiffusionTrainConfig, text: Text | None, run: epath.Path, mesh: Mesh
) -> dict | None:
    """Keep the text parts in the run; returns a frozen encoder's placed parameters, or None."""
    if text is None:
        return None
    rundir.write_frozen_files(run, "tokenizer", text.tokenizer.save)
    if text.encoder is None:
        return None
    rundir.write_frozen(run, "cond_stage", text.encoder, schema.text_of(config.cond).encoder)
    tree = {"cond_stage": text.encoder}
    return sharding.place(tree, sharding.by_rules(tree, sharding.RULES, mesh))["cond_stage"]


def _text_before(workdir: epath.PathLike) -> schema.TextCondConfig | None:
    """The text conditioning that a run was started with."""
    config = rundir.read_config(workdir) if rundir.is_run(workdir) else None
    is_ldm = isinstance(config, schema.LatentDiffusionTrainConfig)
    return schema.text_of(config.cond) if is_ldm else None


def _tokenizer(
    text: schema.TextCondConfig,
    workdir: epath.PathLike,
    before: schema.TextCondConfig | None,
    flag: str,
) -> Any:
    """The run's own tokenizer, or that of the config's path, or None."""
    kept = loading.kept_tokenizer(workdir, text.encoder.max_length)
    if kept is not None and text.tokenizer in ("", before.tokenizer):
        return kept
    given = text.tokenizer and tokens.load_tokenizer(text.tokenizer, text.encoder.max_length)
    if kept is not None and not np.array_equal(given.encode(PROBE), kept.encode(PROBE)):
        raise ValueError(
            f"{flag}.tokenizer {text.tokenizer}: is not the tokenizer in {workdir}/frozen that"
            " this run was trained with; leave the option out, or use another --workdir"
        )
    return given or None


def _encoder(
    text: schema.TextCondConfig,
    path: str,
    workdir: epath.PathLike,
    before: schema.TextCondConfig | None,
    flag: str,
) -> tuple[dict, Any]:
    """(host parameters, tokenizer beside them or None) of the frozen encoder at a path."""
    kept = loading.kept_text_encoder(workdir, before) if before else None
    if kept is not None and text.path in ("", before.path):
        return kept, None
    if not path:
        raise ValueError(
            f"no text encoder: it does not train ({flag}.no-trainable), so give {flag}.path, a"
            " diffusers folder, a checkpoint or a run that holds one"
        )
    params, encoder, tokenizer = loading.load_text_encoder(path, text.encoder.max_length)
    if encoder != text.encoder:
        lines, _ = serialize.difference(text.encoder, encoder)
        raise ValueError(
            f"{flag}.path {path}: its text encoder is not that of the config, {flag}.encoder:"
            f" {'; '.join(lines)}"
        )
    if kept is not None and rundir.params_hash(params) != rundir.params_hash(kept):
        raise ValueError(
            f"{flag}.path {path}: is not the text encoder in {workdir}/frozen that this run"
            " was trained with; leave the option out, or use another --workdir"
        )
    return params, tokenizer
