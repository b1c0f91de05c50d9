"""Which tensors of a checkpoint a model takes: raw or averaged weights, and what is left unread."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from ldm_jax.convert import table
from ldm_jax.convert.compvis import single_file
from ldm_jax.convert.formats import files
from ldm_jax.runtime.log import LOG

StateDict = Mapping[str, Any]  # torch name -> NumPy array, ShapeDtypeStruct or lazy tensor

UNET_PREFIX = single_file.UNET
FIRST_STAGE_PREFIX = single_file.FIRST_STAGE
COND_STAGE_PREFIX = single_file.COND_STAGE
EMA_PREFIX = "model_ema."

IGNORED = (
    (
        "schedule buffers",
        r"(low_scale_model\.)?(betas|alphas_cumprod(_prev)?|sqrt_alphas_cumprod"
        r"|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod"
        r"|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped"
        r"|posterior_mean_coef[12]|lvlb_weights)",
    ),
    ("log-variances of the training loss", r"logvar"),
    ("losses of the first stage", r"(first_stage_model\.)?loss\..+"),
    ("bookkeeping of the moving average", r"model_ema\.(decay|num_updates)"),
    ("position ids", r"cond_stage_model\.(.+\.)?position_ids"),
    (
        "parts of CLIP beside the text encoder",
        r"cond_stage_model\.(model\.)?(text_projection|logit_scale|attn_mask|visual\..+)"
        r"|cond_stage_model\.transformer\.text_projection\.weight",
    ),
    ("depth estimator", r"depth_model\..+"),
    ("averaged weights of another part than the UNet", r"(first|cond)_stage_model\.model_ema\..+"),
)
"""Tensors of a whole checkpoint that the model does not need: (content, pattern of names).

Besides these: the copy that is not taken of the UNet's raw and averaged weights, and a second copy
of the first stage under `cond_stage_model.` (inpainting_big)."""

TEXT_ENCODERS = (
    r"cond_stage_model\.model\.(token_embedding|positional_embedding|transformer|ln_final)\b",
    r"cond_stage_model\.transformer\.text_model\.",
)
"""Names of OpenCLIP's and of OpenAI's text encoder, of which some files hold both."""


class Taken(NamedTuple):
    """The tensors of a checkpoint for a table, and remarks about the others."""

    tensors: dict[str, Any]
    said: tuple[str, ...]


def ema_name(name: str) -> str:
    """Name of a parameter's moving average (`LitEma` deletes the dots)."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def take(tensors: StateDict, entries: list[table.Entry], *, ema: bool = True) -> Taken:
    """Names that entries can consume, averaged weights under their raw names, without `IGNORED`.

    Unknown names stay in: the table refuses them. ValueError if only some parameters
    of the UNet have an average.
    """
    names = {entry.torch for entry in entries}
    copies = {ema_name(name): name for name in names if ema_name(name) in tensors}
    use = ema and bool(copies)
    if copies and not use and not any(name in tensors for name in copies.values()):
        raise ValueError("it holds averaged weights alone, and the raw ones are asked for")
    if use:
        unet_names = sorted(n for n in names if n.startswith(UNET_PREFIX)) or sorted(names)
        lacking = [f"missing {ema_name(n)}" for n in unet_names if ema_name(n) not in copies]
        table.refuse(lacking, "its averaged weights are not whole (ema=False takes the raw ones)")
    twins = {ema_name(name) for name in tensors}  # of losses too, which have no entry
    chosen: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for name, x in tensors.items():
        if use and name in copies:
            chosen[copies[name]] = x
        elif use and ema_name(name) in copies:
            counts["raw weights"] += 1
        elif name in twins:
            counts["averaged weights"] += 1
        elif name not in names and _twin(name) in tensors:
            counts["second copy of the first stage"] += 1
        elif (what := ignored(name) or _second_text_encoder(name, names)) is not None:
            counts[what] += 1
        else:
            chosen[name] = x
    left = ", ".join(f"{what} ({n})" for what, n in counts.items())
    said = (_choice(bool(copies), use), *([f"not needed: {left}"] if left else []))
    return Taken(chosen, said)


def _twin(name: str) -> str | None:
    """Name in the first stage of a tensor that `__is_first_stage__` repeats under
    `cond_stage_model.`."""
    if not name.startswith(COND_STAGE_PREFIX):
        return None
    return FIRST_STAGE_PREFIX + name.removeprefix(COND_STAGE_PREFIX)


def _second_text_encoder(name: str, names: set[str]) -> str | None:
    """Description of a tensor of a second text encoder, which is not read; None for another."""
    if name in names:
        return None
    kinds = [re.compile(kind) for kind in TEXT_ENCODERS]
    read = [kind for kind in kinds if any(kind.match(entry) for entry in names)]
    return (
        "a second text encoder"
        if read and any(k.match(name) for k in kinds if k not in read)
        else None
    )


def _choice(has: bool, use: bool) -> str:
    if not has:
        return "takes the weights as they are: it holds no moving average beside them"
    return f"takes {'the averaged' if use else 'the raw'} weights; it holds both"


def ignored(name: str) -> str | None:
    """The entry of `IGNORED` that a name belongs to, or None."""
    return next((what for what, pattern in IGNORED if re.fullmatch(pattern, name)), None)


def take_from_file(
    path: epath.Path, tensors: StateDict, info: files.Info, entries: list[table.Entry], ema: bool
) -> dict[str, Any]:
    """`take` of a file, with its remarks printed."""
    try:
        taken = take(tensors, entries, ema=ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for line in taken.said:
        LOG.info(f"{path.name}: {line}")
    if info.left:
        more = f" and {len(info.left) - 8} more" if len(info.left) > 8 else ""
        LOG.info(f"{path.name}: beside the state dict: {', '.join(info.left[:8])}{more}")
    return taken.tensors
