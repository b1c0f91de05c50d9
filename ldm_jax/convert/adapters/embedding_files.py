"""Files of learned token embeddings (textual inversion): names and vectors, without a model.

diffusers   .safetensors, .bin   {"<cat>": [n, width] or [width]}
webui       .pt                  {"string_to_param": {"*": [n, width]}, "name", ...}
            .safetensors         {"emb_params": [n, width]}
            .png                 the same as .pt, as JSON in the picture's text
in a LoRA   .safetensors         "bundle_emb.cat.string_to_param.*"
"""

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from ldm_jax.convert.formats import files, safetensors_file, torch_file, torch_writer
from ldm_jax.convert.formats.tensors import LazyTensor
from ldm_jax.runtime import images, reading

TOKEN = re.compile(r"<[^\s<>:]+>")
"""Spelling of a name in prompts. Without its brackets it would be found inside of other words, and
stable-diffusion-webui reads `<lora:cat:1>` as a command."""
BUNDLE = "bundle_emb."
CARD = "sd-ti-embedding"  # the text field of a picture that carries an embedding
PICTURES = (b"\x89PNG", b"RIFF")  # beginnings of PNG and WebP
WEBUI_ID = 265  # of "*" in CLIP's vocabulary, the name within webui's files
FOLDER = ("learned_embeds.safetensors", "learned_embeds.bin")
"""Files that the training scripts of diffusers write."""
SUFFIXES = {"diffusers": ".safetensors", "webui": ".pt"}


def read(path: epath.PathLike, token: str | None = None) -> tuple[str, Any]:
    """(token, its vectors) of a file; the vectors are an array or a tensor that is not read yet.

    The token is `token`, or the name that the file gives, else the file's own name; `<` and `>` are
    put around it. Of several embeddings in a LoRA file, `token` takes the one of this name.
    ValueError names the file, for one that holds none, or several.
    """
    path = file_of(path)
    with reading.opened(path) as file:
        head = file.read(4)
    if head in PICTURES:
        content = _card(path)
    elif files.format_of(path) == "torch":
        content = torch_file.read(path)
    else:
        content, _ = files.open_state_dict(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no embedding, but a {type(content).__name__}")
    named = _bundles(content) or {_name(path, content): content}
    tokens = {as_token(name): inner for name, inner in named.items()}
    if len(tokens) > 1 and token not in tokens:
        raise ValueError(f"{path}: holds the embeddings {', '.join(tokens)}: give the token of one")
    own = token if token in tokens else next(iter(tokens))
    return token or own, _vectors(path, tokens[own])


def file_of(path: epath.PathLike) -> epath.Path:
    """The file of an embedding at a path: itself, or the one that a folder of diffusers holds.

    FileNotFoundError names the path.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist")
    held = [path / name for name in FOLDER if (path / name).exists()]
    if path.is_dir() and not held:
        raise FileNotFoundError(f"{path}: holds no {' or '.join(FOLDER)}; give the file")
    return held[0] if held else path


def as_token(name: str) -> str:
    """A name as the token that stands for it in prompts: `<cat>` of cat."""
    if TOKEN.fullmatch(name):
        return name
    return "<" + re.sub(r"[\s<>:]+", "_", name.strip("<> ")) + ">"


def bundled(names: Iterable[str]) -> tuple[str, ...]:
    """Tokens of the embeddings in a LoRA file, of the names of its tensors."""
    found = (name.split(".")[1] for name in names if name.startswith(BUNDLE))
    return tuple(map(as_token, dict.fromkeys(found)))


def _bundles(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """{name: content as of a file of its own} of a LoRA file."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        if isinstance(key, str) and key.startswith(BUNDLE):
            name, _, part = key.removeprefix(BUNDLE).partition(".")
            found.setdefault(name, {})[part.removeprefix("string_to_param.")] = value
    return found


def _name(path: epath.Path, content: Mapping[Any, Any]) -> str:
    """The name of a file's only embedding: its key in diffusers, the file's name in webui."""
    if "string_to_param" in content:
        name = content.get("name") if path.suffix.lower() == ".png" else None
        return name if isinstance(name, str) and name else path.stem
    keys = [k for k in content if isinstance(k, str) and k not in ("emb_params", "*")]
    return keys[0] if len(content) == 1 and keys else path.stem


def _vectors(path: epath.Path, content: Mapping[Any, Any]) -> Any:
    held = content.get("string_to_param", content)
    if not isinstance(held, dict):
        raise ValueError(f"{path}: its string_to_param is no dict of tensors")
    if held.keys() & {"clip_l", "clip_g"}:
        raise ValueError(
            f"{path}: is made for Stable Diffusion XL (clip_l, clip_g), whose two text encoders"
            " Stable Diffusion 1 and 2 do not have"
        )
    arrays = {k: v for k, v in held.items() if isinstance(v, LazyTensor | np.ndarray)}
    if len(arrays) != 1:
        shown = f", as {', '.join(map(str, list(arrays)[:3]))}" if arrays else ""
        raise ValueError(
            f"{path}: holds {len(arrays)} tensors{shown}, where an embedding is one: it is of"
            " another kind, or holds several"
        )
    return next(iter(arrays.values()))


def _card(path: epath.Path) -> dict[str, Any]:
    """The content of a picture that webui has written."""
    data = reading.read_bytes(path)
    try:
        with images.open_picture(data, ("PNG", "WEBP")) as image:
            text = image.info.get(CARD)
    except Exception as error:  # Pillow raises errors of many classes
        raise ValueError(f"{path}: is a broken picture ({error})") from error
    if text is None:
        raise ValueError(
            f"{path}: is a picture without an embedding in its text ({CARD}); one that is hidden"
            " in the pixels is not read: save it as a .pt in stable-diffusion-webui"
        )
    with reading.refusals(path, "it is not as stable-diffusion-webui writes it"):
        content = reading.parse_json(base64.b64decode(text, validate=True), CARD)
        held = content["string_to_param"]
        held = {k: np.asarray(v["TORCHTENSOR"], np.float32) for k, v in held.items()}
        return {**content, "string_to_param": held}


def write(path: epath.PathLike, token: str, vectors: np.ndarray, to: str) -> None:
    """A file of one embedding for diffusers or for webui, which takes its name from the file's.

    ValueError for a name that does not end as the program expects it.
    """
    if to not in SUFFIXES:
        raise ValueError(f"format {to!r} is not one of {', '.join(SUFFIXES)}")
    if epath.Path(path).suffix != SUFFIXES[to]:
        raise ValueError(f"{path}: an embedding for {to} ends in {SUFFIXES[to]}")
    if to == "diffusers":
        safetensors_file.write(path, {token: vectors}, {"format": "pt"})
        return
    content = {
        "string_to_token": {"*": WEBUI_ID},
        "string_to_param": {"*": vectors},
        "name": token.strip("<>"),
        "step": 0,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    torch_writer.write_object(path, content)
