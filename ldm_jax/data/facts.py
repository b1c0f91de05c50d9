"""Look at a folder of images before a config is made: grey or RGB, and how many classes."""

import numpy as np

from ldm_jax import schema
from ldm_jax.data import folder, packed, sources, transforms

LOOKED_AT = 64  # images, spread over the folder


def facts_of(path: str) -> schema.ImageFacts:
    """Return the facts of a folder of images, plain or packed.

    FileNotFoundError and ValueError as of the folder's own source.
    """
    if packed.is_packed(path):
        meta = packed.read(path)
        kept = {name: meta["source"][name] for name in packed.KEPT}
        source = packed.PackedSource(schema.FolderConfig(path, **kept), "train")
        count = len(meta["classes"] or ())
    else:
        source = folder.FolderSource(schema.FolderConfig(path), "train")
        count = len(source.folders)
    return schema.ImageFacts(
        channels=1 if _all_grey(source) else 3,
        num_classes=count or schema.ImageFacts.num_classes,
    )


def _all_grey(source: sources.Source) -> bool:
    indices = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
    return all(_is_grey(source[int(i)]["image"]) for i in indices)


def _is_grey(data: bytes) -> bool:
    """Tell whether the channels are equal; of what cannot be decoded, nothing speaks against it."""
    try:
        pixels = np.asarray(transforms.decode_image(data, 3))
    except transforms.UndecodableError:
        return True
    return bool((pixels == pixels[..., :1]).all())
