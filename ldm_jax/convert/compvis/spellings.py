"""Other spellings of the tensor names of CompVis checkpoints, and markers of the objective."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

UNET_AVERAGE = "model_ema.diffusion_model"

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile put before every name."""

TEXT_MODEL = re.compile(
    r"(cond_stage_model\.transformer\.)(?=(?:embeddings|encoder|final_layer_norm)\.)"
)
"""Place of the `text_model.` of transformers, which some files of Stable Diffusion 1 leave out."""

STAGE_ATTENTION = re.compile(
    r"((?:(?:first|cond)_stage_model\.)?(?:en|de)coder\.(?:mid\.attn_1|(?:down|up)\.\d+\.attn\.\d+)\.)"
    r"(group_norm|to_q|to_k|to_v|to_out\.0|to_out|query|key|value|proj_attn)(\.(?:weight|bias))"
)
"""Attention of the first stage with the names of diffusers, as converters of 2023 wrote it."""

STAGE_PARTS = {
    "group_norm": "norm",
    **{"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "to_out": "proj_out"},
    **{"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},
}

# The words of a UNet's names, longer ones first, and how many digits of the number after them
# belong together: `LitEma` deleted the dots, so that input_blocks.11.0 became input_blocks110.
UNET_WORDS = re.compile(
    r"(?P<two>(?:input|output)_blocks)(?P<block>\d+)(?P<sub>\d)|label_emb(?P<label>\d)(?P<layer>\d)"
    r"|transformer_blocks|middle_block|skip_connection|time_embed|label_emb|emb_layers|out_layers"
    r"|in_layers|proj_out|proj_in|to_out|to_[qkv]|attn[12]|norm[123]|weight|proj|norm|bias|conv|qkv"
    r"|out|net|op|ff|\d+"
)


class Markers(NamedTuple):
    """Objective of a model as its file names it, beside the weights."""

    prediction: str | None = None
    """"eps" or "v"; None if the file does not say."""
    zero_terminal_snr: bool = False
    by_names: tuple[str, ...] = ()
    """Names of the tensors that say so (`v_pred`, `ztsnr`); they override a YAML."""


def common(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(tensors with the names of CompVis, lines for the log).

    Renames wrappers, the text encoder and the attention of the first stage. Of a tensor in two
    spellings that of CompVis is taken, as its own code would.
    """
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    names = {name: _common_name(name) for name in tensors}
    twice = [name for name, new in names.items() if new != name and new in tensors]
    said = [f"not needed: {len(twice)} tensors in another spelling, as {twice[0]}"] if twice else []
    return {names[name]: x for name, x in tensors.items() if name not in twice}, said


def _common_name(name: str) -> str:
    name = TEXT_MODEL.sub(r"\1text_model.", name)
    return STAGE_ATTENTION.sub(lambda m: m[1] + STAGE_PARTS[m[2]] + m[3], name)


def markers(
    tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], Markers]:
    """(tensors without markers, the markers).

    `v_pred` and `ztsnr` are names that trainers add to say that the model predicts v, with a
    schedule whose last level holds noise alone; `modelspec.prediction_type` is the metadata of
    Stability's specification.
    """
    names = tuple(name for name in ("v_pred", "ztsnr") if name in tensors)
    said = {"v": "v", "epsilon": "eps"}.get(metadata.get("modelspec.prediction_type", ""))
    left = {name: x for name, x in tensors.items() if name not in names}
    return left, Markers("v" if names else said, "ztsnr" in names, names)


def with_unet_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors; a UNet of averaged weights alone gets the names of raw weights.

    Only to recognize the model: the conversion table maps averages to parameters.
    """
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return dict(tensors)
    return {_with_dots(name): x for name, x in tensors.items()}


def _with_dots(name: str) -> str:
    """`model.diffusion_model.out.2.bias` for `model_ema.diffusion_modelout2bias`; others as is."""
    if not name.startswith(UNET_AVERAGE):
        return name
    words, end, short = [], 0, name.removeprefix(UNET_AVERAGE)
    for match in UNET_WORDS.finditer(short):
        if match.start() != end:
            return name
        end = match.end()
        if match["two"]:
            words += [match["two"], match["block"], match["sub"]]
        elif match["label"]:
            words += ["label_emb", match["label"], match["layer"]]
        else:
            words.append(match[0])
    return ".".join(["model.diffusion_model", *words]) if end == len(short) else name
