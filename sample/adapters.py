"""Adapters on the command line, added to a model that was loaded.

`--lora FILE[:UNET[:TEXT]]`, `--embedding FILE[=<TOKEN>]`
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from ldm_jax import bundle, finite
from ldm_jax.adapters import lora, textual_inversion
from ldm_jax.convert.adapters import embedding_files, lora_files
from ldm_jax.prompting import networks
from ldm_jax.runtime.log import LOG


def file_and_scales(text: str) -> tuple[str, tuple[float, float]]:
    """(file, (scale of the UNet, scale of the text encoder)) of FILE[:UNET[:TEXT]].

    The last colons that finite numbers follow belong to the scales: a path may hold others. One
    number is of both. ValueError for a number that is not finite.
    """
    path, numbers = text, []
    while len(numbers) < 2:
        rest, colon, last = path.rpartition(":")
        try:
            number = float(last)
        except ValueError:
            break
        if not colon or not rest:
            break
        path, numbers = rest, [finite.checked(number, f"--lora {text}: the scale"), *numbers]
    first, *more = numbers or [1.0]
    return path, (first, *(more or [first]))


def file_and_token(text: str) -> tuple[str, str | None]:
    """(file, token or None) of FILE[=<TOKEN>]; a path may hold other equals signs."""
    match = re.fullmatch(r"(.+)=(<[^<>]*>)", text, re.DOTALL)
    return (match[1], match[2]) if match else (text, None)


def files(loras: Sequence[str], embeddings: Sequence[str]) -> list[str]:
    """The file of each --lora and --embedding, also where that names a folder."""
    return [
        *(str(lora_files.file_of(file_and_scales(text)[0])) for text in loras),
        *(str(embedding_files.file_of(file_and_token(text)[0])) for text in embeddings),
    ]


def with_networks(options: Any) -> Any:
    """Options whose prompts have no <lora:NAME:SCALE> of --prompt-syntax webui; --lora has these.

    ValueError for a name that --lora-dir does not hold, and for prompts that ask for different
    ones, since all images of a command have the same weights.
    """
    if options.prompt_syntax != "webui":
        return options
    given = (options.prompt,) if isinstance(options.prompt, str) else options.prompt
    texts, asked = zip(*(networks.cut(text) for text in given)) if given else ((), ())
    if any(one != asked[0] for one in asked):
        raise ValueError("--prompt: all prompts of a command ask for the same LoRAs, these do not")
    found = [
        f"{_file_named(options.lora_dir, one.name)}:{one.unet:g}:{one.text:g}"
        for one in (asked[0] if asked else ())
    ]
    prompt = texts[0] if isinstance(options.prompt, str) else texts
    return dataclasses.replace(options, prompt=prompt, lora=(*options.lora, *found))


def _file_named(folder: str | None, name: str) -> str:
    """File of a LoRA in --lora-dir, by its name without ending."""
    if folder is None:
        raise ValueError(f"<lora:{name}>: give --lora-dir, the folder of {name}.safetensors")
    known = {
        path.stem: str(path)
        for path in sorted(epath.Path(folder).iterdir())
        if path.suffix in (".safetensors", ".pt", ".ckpt", ".bin")
    }
    if name not in known:
        shown = ", ".join(list(known)[:20]) or "nothing"
        raise ValueError(f"<lora:{name}>: --lora-dir {folder} has no such file, but {shown}")
    return known[name]


def with_loras(
    model: bundle.LatentDiffusion, given: Sequence[str], ignore_unknown: bool
) -> bundle.LatentDiffusion:
    """`model` with the LoRAs of --lora in its parameters, where these lie.

    ValueError names the file that is none, is broken, or is made for another model.
    """
    if not given:
        return model
    loras = []
    for text in given:
        path, scales = file_and_scales(text)
        one = lora.read(path, model, ignore_unknown=ignore_unknown)
        LOG.info(f"{path}: {one!r}, scales {scales[0]:g} and {scales[1]:g} of the text encoder")
        loras.append((one, scales))
    params = lora.merged(model.params, loras)
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, model.params)
    return dataclasses.replace(model, params=placed)


def with_embeddings(model: bundle.LatentDiffusion, given: Sequence[str]) -> bundle.LatentDiffusion:
    """`model` that knows the words of --embedding.

    ValueError names the file that is none, is broken, or is made for another model, and a token
    that two files have.
    """
    words: dict[str, textual_inversion.Embedding] = {}
    for text in given:
        path, token = file_and_token(text)
        one = textual_inversion.read(path, model, token=token)
        same = next((p for p, w in words.items() if w.token.lower() == one.token.lower()), None)
        if same is not None:
            raise ValueError(
                f"--embedding: {same} and {path} are both {one.token}; give one of them another"
                f' token, as "{path}=<other>"'
            )
        LOG.info(f"{path}: {one!r}")
        words[text] = one
    return textual_inversion.added(model, list(words.values()))
