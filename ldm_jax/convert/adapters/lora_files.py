"""Names of LoRA files: which module of a model each tensor belongs to, and which part it is.

Three programs wrote most files. A module of the UNet, `down_blocks.0.attentions.0.proj_in`, is

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight         PEFT and diffusers
    unet. ... .attn1.to_q.lora.down.weight                        diffusers, of attention alone
    unet. ... .attn1.processor.to_q_lora.down.weight              diffusers in 2023
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight   kohya, and LyCORIS

Underscores do not tell where a name of kohya's ends (`to_out_0`, `proj_in`): names are looked up
among those of the model's own modules, all written with underscores.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from ldm_jax import finite
from ldm_jax.convert.adapters import embedding_files
from ldm_jax.convert.formats import files
from ldm_jax.runtime import reading

PREFIXES = {
    "unet": ("lora_unet_", "unet."),
    "cond_stage": ("lora_te_", "lora_te1_", "text_encoder."),
}
"""Beginnings of the names of each part of a model."""
FOREIGN = ("text_encoder_2.", "text_encoder_3.", "lora_te2_", "lora_te3_", "transformer.", "vae.")
"""Beginnings of what no model here has: Stable Diffusion XL's second encoder, other networks."""

# How a tensor's name ends, and the part of an update that it is. The names of the parts are
# kohya's, whose set is the largest. Longer endings come first.
ENDINGS = {
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    "_lora.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    ".lora.down.weight": "lora_down",
    ".lora.up.weight": "lora_up",
    ".lora_A.default.weight": "lora_down",
    ".lora_B.default.weight": "lora_up",
    ".lora_A.weight": "lora_down",
    ".lora_B.weight": "lora_up",
    ".lora_B.bias": "bias",
    ".lora_down.weight": "lora_down",
    ".lora_mid.weight": "lora_mid",
    ".lora_up.weight": "lora_up",
    ".lora_mid": "lora_mid",
    **{
        f".{part}": part
        for part in (
            *("alpha", "scale", "dora_scale", "diff", "diff_b", "w_norm", "b_norm"),
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
}
# Updates that are read by nobody here; refused by name, so that nothing is dropped.
UNREAD = {
    ".on_input": "IA3",
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".dyn_up": "a low rank of two factors",
    ".dyn_down": "a low rank of two factors",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
}
# The attention of diffusers in 2023 and of its text encoders had names of their own.
FORMER_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
ADAPTER_FILES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CHOICES = (".safetensors", ".bin", ".pt", ".ckpt")


class Content(NamedTuple):
    """Content of an adapter's file, in the paths of a model.

    parts: {part of the model: {module, a path of ours: {part of the update: tensor in the file}}}.
    alphas: {(part of the model, module): alpha} of PEFT's metadata; kohya's are tensors.
    rank_stabilized: the scale is alpha / sqrt(rank), not alpha / rank.
    unknown: names that belong to no module of the model.
    embeddings: tokens of learned words that the file holds beside the LoRA.
    """

    parts: dict[str, dict[str, dict[str, Any]]]
    alphas: dict[tuple[str, str], float]
    rank_stabilized: bool
    unknown: tuple[str, ...]
    embeddings: tuple[str, ...]
    metadata: dict[str, str]


def file_of(path: epath.PathLike) -> epath.Path:
    """The file of an adapter at a path: itself, or the one that a folder of diffusers holds.

    FileNotFoundError or ValueError name the path.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist")
    if not path.is_dir():
        return path
    for name in ADAPTER_FILES:
        if (path / name).exists():
            return path / name
    held = sorted(file for file in path.iterdir() if file.suffix in CHOICES)
    if len(held) == 1:
        return held[0]
    raise ValueError(
        f"{path}: holds {len(held)} files that could be an adapter, of {', '.join(CHOICES)}: give"
        " the file"
    )


def read(path: epath.PathLike, modules: Mapping[str, Iterable[str]]) -> Content:
    """The tensors of a LoRA file, sorted by the modules of a model; none is read.

    modules: {"unet": paths, "cond_stage": paths} of the modules that the model has.
    ValueError names the file, for one that is none of these, or of another kind of network.
    """
    path = file_of(path)
    tensors, info = files.open_state_dict(path)
    known = {part: {p.replace("/", "_"): p for p in paths} for part, paths in modules.items()}
    parts: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in modules}
    unknown = []
    for name, tensor in tensors.items():
        if name.startswith(embedding_files.BUNDLE):
            continue
        _refuse_foreign(name, path)
        place = _place(name, known)
        if place is None:
            unknown.append(name)
            continue
        part, module, kind = place
        update = parts[part].setdefault(module, {})
        if kind in update:
            raise ValueError(f"{path}: {module} has {kind} twice, once as {name}")
        update[kind] = tensor
    if not any(parts.values()):
        raise ValueError(
            f"{path}: none of its {len(tensors)} tensors belongs to this model's UNet or text"
            f" encoder, as {', '.join(list(tensors)[:3])}: it is no LoRA, or another network's"
        )
    alphas, stabilized = _peft_settings(path, info.metadata, parts)
    words = embedding_files.bundled(tensors)
    return Content(parts, alphas, stabilized, tuple(unknown), words, info.metadata)


def _refuse_foreign(name: str, path: epath.Path) -> None:
    for ending, kind in UNREAD.items():
        if name.endswith(ending):
            raise ValueError(f"{path}: {name} is of {kind}, which is not read")
    if name.startswith(FOREIGN):
        raise ValueError(
            f"{path}: {name} is of a network that Stable Diffusion 1 and 2 do not have; the file is"
            " made for another model"
        )


def _place(name: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """(part of the model, module, part of the update) of a tensor; None where there is none."""
    ending = next((e for e in ENDINGS if name.endswith(e)), None)
    if ending is None:
        return None
    module = name[: -len(ending)]
    for part, prefixes in PREFIXES.items():
        prefix = next((p for p in prefixes if module.startswith(p)), None)
        if prefix is not None:
            path = _module(module.removeprefix(prefix), part, known.get(part, {}))
            return None if path is None else (part, path, ENDINGS[ending])
    for part, names in known.items():  # no prefix, as `save_lora_adapter` of one network writes
        path = _module(module, part, names)
        if path is not None:
            return part, path, ENDINGS[ending]
    return None


def _module(name: str, part: str, known: Mapping[str, str]) -> str | None:
    """Our path of a module; `name` is without what says the part of the model."""
    for noise in ("base_model.model.", "text_model."):
        name = name.removeprefix(noise)
    name = name.replace(".processor.", ".").replace(".base_layer", "")
    head, _, last = name.rpartition(".")
    if part == "cond_stage" and last in FORMER_TEXT:
        name = f"{head}.{FORMER_TEXT[last]}"
    elif last == "to_out":  # the list of diffusers' attention had no number in 2023
        name = f"{name}.0"
    name = name.replace(".", "_")
    return known.get(name) or known.get(f"text_model_{name}")


# --- alpha in PEFT's metadata --------------------------------------------------------------------


def _peft_settings(
    path: epath.Path, metadata: Mapping[str, str], parts: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[tuple[str, str], float], bool]:
    """Alpha of each module, and whether it is divided by sqrt(rank); nothing without metadata."""
    settings = _json(metadata.get("lora_adapter_metadata"), f"{path}: lora_adapter_metadata")
    beside = path.parent / "adapter_config.json"
    if not settings and path.name.startswith("adapter_model") and beside.exists():
        settings = reading.read_object(beside)
    alphas, stabilized = {}, False
    for part, modules in parts.items():
        prefix = PREFIXES[part][-1]
        own = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
        own = own or {k: v for k, v in settings.items() if "." not in k}
        if not own:
            continue
        stabilized |= own.get("use_rslora") is True
        patterns = own.get("alpha_pattern") or {}
        for module in modules:
            dotted = module.replace("/", ".")
            matched = (a for key, a in patterns.items() if _matches(key, dotted))
            alpha = next(matched, own.get("lora_alpha"))
            if alpha is not None:
                alphas[part, module] = finite.checked(alpha, f"{path}: alpha of {module}:")
    return alphas, stabilized


def _matches(pattern: str, dotted: str) -> bool:
    """True if a key of PEFT's `alpha_pattern` is the name of a module, or the end of it."""
    normal = re.sub(r"[._]", "_", pattern)
    name = dotted.replace(".", "_")
    return name == normal or name.endswith(f"_{normal}")


def _json(text: str | None, what: str) -> dict[str, Any]:
    if text is None:
        return {}
    value = reading.parse_json(text, what)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


# --- writing -------------------------------------------------------------------------------------


def dotted(part: str, module: str) -> str:
    """torch's name of a module: `mid_block.attentions.0.proj_in` of mid_block/attentions_0/proj_in.

    The text encoder's begin with `text_model`, which diffusers takes with all transformers.
    """
    from ldm_jax.convert.diffusers import tables

    if part == "unet":
        return tables.torch_name(f"{module}/kernel", old=False).removesuffix(".weight")
    return module.replace("/", ".")


def kohya_name(part: str, module: str) -> str:
    """kohya's name of a module, as stable-diffusion-webui reads it."""
    return PREFIXES[part][0] + module.replace("/", "_")


def peft_metadata(settings: Mapping[str, Mapping[str, tuple[int, float]]]) -> dict[str, str]:
    """The metadata from which diffusers takes ranks and alphas.

    settings: {part: {torch's name of a module: (rank, alpha)}}.
    """
    flat: dict[str, Any] = {}
    for part, modules in settings.items():
        if not modules:
            continue
        (rank, alpha), *_ = modules.values()
        own = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(modules),
            "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
            "alpha_pattern": {name: a for name, (_, a) in modules.items() if a != alpha},
        }
        flat |= {PREFIXES[part][-1] + key: value for key, value in own.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat, sort_keys=True)}


def kohya_metadata(
    ranks: Iterable[int], alphas: Iterable[float], base: str
) -> tuple[dict[str, str], dict[str, str]]:
    """(kohya's settings, the standard of model files): both tell the base model.

    base: "v1", "v2-512" or "v2-768-v".
    """
    one = lambda values: str(next(iter(values))) if len(values) == 1 else "Dynamic"  # noqa: E731
    trained = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": one(set(ranks)),
        "ss_network_alpha": one({f"{alpha:g}" for alpha in alphas}),
        "ss_v2": str(base != "v1"),
        "ss_base_model_version": "sd_v1" if base == "v1" else "sd_v2",
    }
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{base}/lora",
        "modelspec.implementation": "ldm_jax",
    }
    return trained, spec
