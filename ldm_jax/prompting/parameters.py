"""The text "parameters" that stable-diffusion-webui keeps in its pictures, and that others read.

a cat
Negative prompt: blurry
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768
"""

import json
import re
import typing
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from ldm_jax.prompting.composed import Emphasis
from ldm_jax.runtime import reading

LONGEST = 1 << 20  # characters that are read
NEGATIVE = "Negative prompt:"
FEWEST = 3
"""Fields that the last line has at least, or it belongs to the prompt."""
# the bounded name keeps the time linear in a line without colons
FIELD = re.compile(r'(\w[\w /-]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LARGEST_SIDE = 8192  # pixels that the text of a picture may ask for

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "lms": "LMS",
    "plms": "PLMS",
    "unipc": "UniPC",
}
"""{solver: sampler of webui}."""
SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "trailing": "SGM Uniform"}
"""{spacing: schedule type of webui}; the others are its sampler's own."""
UPSCALERS = {
    "latent": "Latent",
    "latent-antialiased": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
"""{upscaler of a hires fix: its name in webui}."""
SOURCES = {"cpu": "CPU", "nv": "NV", "own": "ldm_jax"}


class Parameters(NamedTuple):
    """Request of a picture."""

    prompt: str
    negative_prompt: str
    fields: dict[str, str]
    """The last line: {"Steps": "20", ...}."""


# --- writing --------------------------------------------------------------------------------------


def written(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The text of a picture of (height, width) from the settings that `ldm-sample` keeps in it."""
    plain = settings.get("prompt_syntax", "plain") == "plain"

    def text(name: str) -> str:
        given = settings.get(name) or ""
        joined = given if isinstance(given, str) else "\n".join(given)
        return re.sub(r"([()\[\]\\])", r"\\\1", joined) if plain else joined

    lines = [text("prompt")]
    if settings.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {text('negative_prompt')}")
    given = {name: x for name, x in _fields(settings, size).items() if x is not None}
    lines.append(", ".join(f"{name}: {_quoted(str(x))}" for name, x in given.items()))
    return "\n".join(lines)


def _fields(settings: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Fields in webui's order; None for one that is left out."""
    source, varied = settings.get("noise_source", "own"), settings.get("subseed_strength", 0.0)
    index = settings.get("index", 0) if source != "own" else 0  # image i is of seed + i there
    resized = settings.get("seed_resize_from")
    names = [PurePath(path.rsplit(":", 2)[0]).stem for path in settings.get("lora", ())]
    solver, skip = settings.get("solver", ""), settings.get("clip_skip", 1)
    factor, larger = settings.get("hires_scale", 1.0), settings.get("hires_size")
    hires = {}
    if factor > 1 or larger:  # the size is that of the first pass
        size = settings["height"], settings["width"]
        hires = {
            "Hires upscale": None if larger else f"{factor:g}",
            "Hires resize": f"{larger[1]}x{larger[0]}" if larger else None,
            "Hires steps": settings["hires_steps"] or None,
            "Hires upscaler": UPSCALERS.get(settings["hires_upscaler"], settings["hires_upscaler"]),
        }
    mode = settings.get("emphasis", "original")
    return {
        "Steps": settings.get("steps"),
        "Sampler": SAMPLERS.get(solver, solver),
        "Schedule type": SCHEDULES.get(settings.get("spacing", "")),
        "CFG scale": f"{settings.get('guidance_scale') or 1:g}",
        "Seed": settings.get("seed", 0) + (0 if varied else index),
        "First index": settings.get("index") or None if source == "own" else None,
        "Size": f"{size[1]}x{size[0]}",
        "Model": PurePath(str(settings.get("model", ""))).stem,
        "Variation seed": settings.get("subseed", 0) + index if varied else None,
        "Variation seed strength": f"{varied:g}" if varied else None,
        "Seed resize from": f"{resized[1]}x{resized[0]}" if resized else None,
        "Denoising strength": settings["hires_strength"] if hires else settings.get("strength"),
        "Clip skip": skip if skip > 1 else None,
        "ENSD": settings.get("eta_noise_seed_delta") or None,
        "RNG": SOURCES[source],
        **hires,
        **(_of_mask(settings) if settings.get("masks") else {}),
        "Emphasis": None if mode == "original" else _shown(mode),
        "Loras": ", ".join(names) or None,
        "Version": f"ldm_jax {settings.get('made_with', {}).get('ldm_jax', '')}".strip(),
    }


CONTENTS = {"fill": "fill", "original": "original"}
CONTENTS |= {"noise": "latent noise", "nothing": "latent nothing"}


def _of_mask(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of inpainting."""
    alone = settings.get("only_masked", False)
    return {
        "Mask mode": "Inpaint not masked" if settings.get("mask_invert") else None,
        "Mask blur": f"{settings['mask_blur']:g}" if settings.get("mask_blur") else None,
        "Inpaint area": "Only masked" if alone else None,
        "Masked area padding": settings.get("padding") if alone else None,
        "Masked content": CONTENTS.get(settings.get("content", "")),
    }


def _shown(mode: str) -> str:
    """A mode of emphasis as webui writes it: "No norm"."""
    return mode.capitalize().replace("-", " ")


def _quoted(value: str) -> str:
    """A value that holds a separator as a JSON string."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


# --- reading --------------------------------------------------------------------------------------


def parse(text: str) -> Parameters:
    """Inverse of `written`, also for webui's own texts.

    The last line is one of fields if it has three of them or more. A `WxH` value also gives NAME-1
    and NAME-2. ValueError for a text that is too long.
    """
    if len(text) > LONGEST:
        raise ValueError(f"parameters of {len(text)} characters, {LONGEST} at most")
    *lines, last = text.strip("\x00 \n").split("\n")
    found = FIELD.findall(last)
    if len(found) < FEWEST:
        lines, found = [*lines, last], []
    prompt, negative = lines, []
    for number, line in enumerate(lines):
        if line.strip().startswith(NEGATIVE):
            prompt = lines[:number]
            negative = [line.strip().removeprefix(NEGATIVE).strip(), *lines[number + 1 :]]
            break
    fields: dict[str, str] = {}
    for name, value in found:
        plain = _unquoted(value.strip())
        fields[name.strip()] = plain
        sides = re.fullmatch(r"(\d+)x(\d+)", plain)
        if sides:
            fields |= {f"{name}-1": sides.group(1), f"{name}-2": sides.group(2)}
    return Parameters("\n".join(prompt).strip(), "\n".join(negative).strip(), fields)


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def of_info(info: Mapping[str, Any], name: str = "") -> Parameters | None:
    """Request in the text fields of a picture by webui, NovelAI or ComfyUI; None without one.

    ValueError, beginning with `name`, for fields that are broken.
    """
    if isinstance(info.get("parameters"), str):
        return parse(info["parameters"])
    if info.get("Software") == "NovelAI" and isinstance(info.get("Comment"), str):
        return _novel_ai(info, name)
    if isinstance(info.get("prompt"), str):
        return _comfy_ui(reading.parse_json(info["prompt"], f"{name}: its workflow"))
    return None


def _novel_ai(info: Mapping[str, Any], name: str) -> Parameters:
    """Of NovelAI, which webui reads as Clip skip 2 and ENSD 31337."""
    values = reading.parse_json(info["Comment"], f"{name}: its comment")
    if not isinstance(values, dict):
        raise ValueError(f"{name}: its comment is no object of names and values")
    named = {
        "Steps": "steps",
        "CFG scale": "scale",
        "Seed": "seed",
        "Denoising strength": "strength",
    }
    fields = {field: str(values[key]) for field, key in named.items() if key in values}
    sampler = str(values.get("sampler", ""))
    fields["Sampler"] = SAMPLERS.get(sampler.removeprefix("k_"), sampler)
    fields |= {"Clip skip": "2", "ENSD": "31337"}
    return Parameters(str(info.get("Description", "")), str(values.get("uc", "")), fields)


def _comfy_ui(graph: Any) -> Parameters | None:
    """Of the first sampler in a workflow of ComfyUI; None if there is none."""
    nodes = graph if isinstance(graph, dict) else {}
    samplers = [node for node in nodes.values() if _inputs(node).keys() >= {"seed", "steps", "cfg"}]
    if not samplers:
        return None
    given = _inputs(samplers[0])

    def text(link: Any) -> str:
        node = nodes.get(link[0]) if isinstance(link, list) and link else None
        found = _inputs(node).get("text", "")
        return found if isinstance(found, str) else ""

    named = {"Steps": "steps", "CFG scale": "cfg", "Seed": "seed", "Denoising strength": "denoise"}
    fields = {field: str(given[key]) for field, key in named.items() if key in given}
    sampler = str(given.get("sampler_name", ""))
    fields["Sampler"] = SAMPLERS.get(sampler, sampler)
    if given.get("scheduler") in SCHEDULES:
        fields["Schedule type"] = SCHEDULES[given["scheduler"]]
    return Parameters(text(given.get("positive")), text(given.get("negative")), fields)


def _inputs(node: Any) -> dict[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def options(known: Parameters) -> tuple[dict[str, Any], list[str]]:
    """(options of `ldm-sample text2img` that draw the same, what of it they do not follow).

    Values that are no numbers of their kind are among the latter.
    """
    fields, given, left = dict(known.fields), {}, []
    numbers = {
        "Steps": ("steps", int),
        "CFG scale": ("guidance_scale", float),
        "Seed": ("seed", int),
        "First index": ("first_index", int),
        "Size-1": ("width", int),
        "Size-2": ("height", int),
        "Clip skip": ("clip_skip", int),
        "Variation seed": ("subseed", int),
        "ENSD": ("eta_noise_seed_delta", int),
        "Variation seed strength": ("subseed_strength", float),
        "Hires upscale": ("hires_scale", float),
        "Hires steps": ("hires_steps", int),
        "Hires resize-1": ("hires_width", int),
        "Hires resize-2": ("hires_height", int),
    }
    if "Hires upscale" in fields or "Hires resize" in fields:
        numbers["Denoising strength"] = ("hires_strength", float)
    for field, (name, kind) in numbers.items():
        if field in fields:
            value = fields.pop(field)
            try:
                given[name] = kind(value)
            except ValueError:
                left.append(f"{field}: {value}")
    for name in ("height", "width", "hires_height", "hires_width"):
        factor = 1 if name.startswith("hires") else given.get("hires_scale", 1)
        if given.get(name, 512) * factor > LARGEST_SIDE:
            side = f"{given.get(name, 512) * factor:g}"
            raise ValueError(f"asks for {name} {side}: {LARGEST_SIDE} pixels at most")
    larger = given.pop("hires_height", 0), given.pop("hires_width", 0)
    if any(larger):
        given["hires_size"] = larger
    sampler = fields.pop("Sampler", "")
    for spacing, shown in SCHEDULES.items():  # "DPM++ 2M Karras" of older versions
        if sampler.endswith(f" {shown}"):
            sampler = sampler.removesuffix(f" {shown}")
            fields.setdefault("Schedule type", shown)
        if fields.get("Schedule type") == shown:
            given["spacing"] = spacing
            del fields["Schedule type"]
    solvers = {shown: solver for solver, shown in SAMPLERS.items()}
    if sampler in solvers:
        given["solver"] = solvers[sampler]
    elif sampler:
        left.append(f"Sampler: {sampler}")
    sources = {shown: source for source, shown in SOURCES.items()} | {"GPU": "nv"}
    upscalers = {shown: name for name, shown in UPSCALERS.items()}
    modes = {_shown(mode): mode for mode in typing.get_args(Emphasis)}
    for field, name, values, default in (
        ("RNG", "noise_source", sources, "GPU"),
        ("Emphasis", "emphasis", modes, "Original"),
    ):
        if fields.get(field, default) in values:
            given[name] = values[fields.pop(field, default)]
    if fields.get("Hires upscaler") in upscalers:
        given["hires_upscaler"] = upscalers[fields.pop("Hires upscaler")]
    if fields.get("Schedule type") == "Automatic":
        del fields["Schedule type"]
    silent = {"Size", "Hires resize", "Model", "Model hash", "VAE", "VAE hash", "Version"}
    silent |= {"Loras", "Lora hashes"}
    left += [f"{name}: {value}" for name, value in fields.items() if name not in silent]
    texts = {"prompt": (known.prompt,), "negative_prompt": known.negative_prompt}
    return given | texts | {"prompt_syntax": "webui", "num_images": 1}, left
