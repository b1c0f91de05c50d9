"""What the fields of the page ask for, and what the text of a picture puts into them."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.prompting import parameters
from ldm_jax.runtime import images
from ldm_jax.sample.web import names
from ldm_jax.sample.web.asked import Asked, Extra, ExtraSingle, Img2Img, Txt2Img
from ldm_jax.sample.web.catalog import Entry
from ldm_jax.sample.web.limits import RefusedError
from ldm_jax.sample.web.translate import UPSCALERS

FILLS = ("fill", "original", "latent noise", "latent nothing")
RESIZES = ("just resize", "crop and resize", "resize and fill", "just resize (latent)")
NEEDS = {
    "text": ("text", "class", "unconditional"),
    "image": ("text", "class", "unconditional"),
    "inpaint": ("text", "class", "unconditional", "inpaint"),
}
"""{tab: kinds of models that can do it}."""
WORDS = ("text", "inpaint")
"""Kinds of models that may take a prompt."""
FIRST = {"class": "Class to image", "unconditional": "From noise"}
"""{kind: label of the first tab}, where it is not that of a text."""

USUAL = {
    **{"noise_source": "nv", "emphasis": "original", "subseed_strength": 0, "first_index": 0},
    **{"eta_noise_seed_delta": 0, "hires_size": None},
}
"""{option of a picture's text that has no field: what the page draws with}."""


def refusal(entry: Entry, tab: str) -> str:
    """Why a model cannot do what a tab is for; "" if it can."""
    if entry.kind in NEEDS.get(tab, (entry.kind,)):
        return ""
    return (
        f"{entry.title} is a model of {entry.kind}, which is not for this tab; it is for models of"
        f" {', '.join(NEEDS[tab])}"
    )


def asked(entry: Entry, tab: str, given: dict[str, Any], *, save: bool) -> Asked | Extra:
    """The request of a tab for a model. RefusedError for what is missing.

    given: {field: value}; save: keep the pictures.
    """
    if tab == "upscale":
        if given["small"] is None:
            raise RefusedError(422, "give a picture to enlarge")
        return ExtraSingle(
            image=encoded(given["small"]),
            upscaler_1=given["upscaler"],
            upscaling_resize=given["factor"],
        )
    tab = "text" if tab == "info" else tab
    if told := refusal(entry, tab):
        raise RefusedError(422, told)
    words = entry.kind in WORDS
    prompt = given["classes"] if entry.kind == "class" else given["prompt"] if words else ""
    shared = {
        "prompt": prompt or "",
        "negative_prompt": given["negative"] if words else "",
        "styles": (given["styles"] or None) if words else None,
        "sampler_name": given["sampler"],
        "scheduler": given["schedule"],
        "steps": given["steps"],
        "cfg_scale": given["scale"],
        "seed": -1 if given["seed"] is None else given["seed"],
        "batch_size": given["batch"],
        "n_iter": given["rounds"],
        "width": given["width"],
        "height": given["height"],
        "save_images": save,
        "override_settings": {
            "sd_model_checkpoint": entry.title,
            "CLIP_stop_at_last_layers": given["skip"] if entry.kind == "text" else 1,
        },
    }
    if tab == "text":
        return Txt2Img(**shared, **(_hires(given) if entry.kind == "text" else {}))
    shared |= {"denoising_strength": given["strength"], "resize_mode": given["resize"]}
    if tab == "image":
        if given["image"] is None:
            raise RefusedError(422, "give a picture to begin with")
        return Img2Img(**shared, init_images=[encoded(given["image"])])
    start, mask = painted(given["canvas"])
    return Img2Img(
        **shared,
        init_images=[encoded(start)],
        mask=encoded(mask),
        mask_blur=given["blur"],
        inpainting_fill=given["fill"],
        inpaint_full_res=given["only"],
        inpaint_full_res_padding=given["padding"],
        inpainting_mask_invert=int(given["invert"]),
    )


def _hires(given: dict[str, Any]) -> dict[str, Any]:
    if not given["hires"]:
        return {}
    return {
        "enable_hr": True,
        "hr_scale": given["hr_scale"],
        "hr_upscaler": given["hr_upscaler"],
        "hr_second_pass_steps": given["hr_steps"],
        "denoising_strength": given["hr_strength"],
    }


def size_of(one: Asked | Extra, entry: Entry) -> str:
    """What a request begins with, as "3x512x512": pictures, height, width."""
    if isinstance(one, Extra):
        return "one picture"
    return f"{one.batch_size}x{one.height or entry.size}x{one.width or entry.size}"


def encoded(picture: Image.Image) -> str:
    """Base64 of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def painted(canvas: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """(picture, mask in mode L) of the canvas. RefusedError without one of them."""
    if canvas is None or canvas.get("background") is None:
        raise RefusedError(422, "give a picture to paint on")
    start = canvas["background"]
    alphas = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in canvas["layers"]]
    mask = np.max(alphas, axis=0) if alphas else np.zeros(start.size[::-1], np.uint8)
    if not mask.any():
        raise RefusedError(422, "paint over what is to be drawn anew")
    return start.convert("RGB"), Image.fromarray(np.uint8(255 * (mask > 0)))


def inserted(prompt: str, name: str | None, weight: float) -> str:
    """The prompt with a LoRA or an embedding."""
    if not name:
        return prompt
    if name.startswith("<lora:"):
        name = name.replace(":1>", f":{weight:g}>")
    elif weight != 1:
        name = f"({name}:{weight:g})"
    return f"{prompt} {name}".strip()


def text_of(data: bytes) -> str:
    """What a picture says of how it was made, as webui writes it. ValueError for no picture."""
    info = images.info_of(data)
    known = parameters.of_info(info, "the picture")
    if known is None:
        return "The picture says nothing of how it was made."
    return info.get("parameters") or "\n".join(
        [
            known.prompt,
            f"{parameters.NEGATIVE} {known.negative_prompt}",
            ", ".join(f"{name}: {value}" for name, value in known.fields.items()),
        ]
    )


def values_of(text: str, classes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """({field: value} that the text of a picture names, what of it no field follows).

    classes: those of the model. ValueError for numbers out of bounds.
    """
    known = parameters.parse(text)
    given, left = parameters.options(known)
    upscalers = {kind: name for name, kind in UPSCALERS.items()}
    spacings = {spacing: name for name, (_, spacing) in names.SCHEDULES.items() if spacing}
    found = {
        "prompt": known.prompt,
        "negative": known.negative_prompt,
        "classes": known.prompt if known.prompt in classes else None,
        "sampler": parameters.SAMPLERS.get(given.get("solver", "")),
        "hires": "hires_scale" in given,
        "hr_upscaler": upscalers.get(given.get("hires_upscaler", "")),
    }
    if known.fields:
        found["schedule"] = spacings.get(given.get("spacing", ""), "automatic")
    if found["hires"]:
        found["hr_steps"] = given.get("hires_steps", 0)
    same = {
        **{"steps": "steps", "width": "width", "height": "height", "scale": "guidance_scale"},
        **{"seed": "seed", "skip": "clip_skip", "hr_scale": "hires_scale"},
        **{"hr_strength": "hires_strength"},
    }
    found |= {field: given.get(name) for field, name in same.items()}
    mark = "Denoising strength: "
    for told in [one for one in left if one.startswith(mark)]:  # of a picture from a picture
        try:
            found["strength"] = float(told.removeprefix(mark))
        except ValueError:
            continue
        left.remove(told)
    left += [f"{n}: {given[n]}" for n, usual in USUAL.items() if given.get(n, usual) != usual]
    return {name: value for name, value in found.items() if value is not None}, left
