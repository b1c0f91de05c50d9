"""LoRAs that a prompt asks for, as stable-diffusion-webui writes them: `<lora:name:0.8>`.

One number scales both halves of a LoRA; of two the first is of the text encoder, the second of the
UNet, which `te=` and `unet=` name.
"""

import re
from typing import NamedTuple

from ldm_jax import finite

TAG = re.compile(r"<(\w+):([^<>]+)>")


class Network(NamedTuple):
    """A LoRA by its file's name without ending, and the scales of its halves."""

    name: str
    unet: float
    text: float


def cut(prompt: str) -> tuple[str, list[Network]]:
    """(the prompt without tags, what these ask for). ValueError for a tag of something else."""
    found = [_network(match) for match in TAG.finditer(prompt)]
    return (TAG.sub("", prompt), found) if found else (prompt, [])


def _network(match: re.Match) -> Network:
    tag, kind = match.group(), match.group(1)
    if kind not in ("lora", "lyco"):
        raise ValueError(f"{tag}: only <lora:NAME:SCALE> is known, not {kind!r}")
    name, *rest = match.group(2).split(":")
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    plain = [part for part in rest if "=" not in part]
    if named.keys() - {"te", "unet"} or len(plain) > 2 or not name.strip():
        raise ValueError(f"{tag}: give <lora:NAME>, <lora:NAME:SCALE> or <lora:NAME:TEXT:UNET>")
    text = _number(named.get("te", plain[0] if plain else "1"), tag)
    unet = plain[1] if len(plain) > 1 else named.get("unet")
    return Network(name.strip(), text if unet is None else _number(unet, tag), text)


def _number(text: str, tag: str) -> float:
    try:
        return finite.checked(float(text), f"{tag}: the scale")
    except ValueError as error:
        raise ValueError(f"{tag}: {text!r} is no finite number") from error
