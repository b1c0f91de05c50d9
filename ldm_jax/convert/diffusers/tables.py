"""Tables of diffusers names, made from our own paths: they are torch's with `_N` for `.N`.

Self-attention is the exception. Our first stage has the names of diffusers' Flax classes and of its
torch classes of 2022 (`query`, `key`, `value`, `proj_attn`), our UNet today's (`to_q`, ...,
`to_out.0`); a file has either.
"""

import re
from collections.abc import Iterable
from typing import Any

from flax import traverse_util

from ldm_jax.convert.table import CONV, DENSE, EMBEDDING, VECTOR, Entry, Layout

NUMBERED = re.compile(
    r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net"
    r"|to_out)_(\d+)"
)
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
NEW = {old: new for new, old in OLD.items()}
SAME = Layout("...", "...")  # the Flax classes' own files


def entries(shapes: dict, old: bool = False) -> list[Entry]:
    """Entries of a UNet or a first stage, whose parameters have these shapes; `old` as above."""
    flat = traverse_util.flatten_dict(shapes, sep="/")
    return [Entry(torch_name(path, old), (path,), _layout(path, x)) for path, x in flat.items()]


def flax_entries(shapes: dict) -> list[Entry]:
    """Entries of a Flax file, whose paths and layouts are ours."""
    return [Entry(path, (path,), SAME) for path in traverse_util.flatten_dict(shapes, sep="/")]


def has_old_names(names: Iterable[str]) -> bool:
    """True if a file's self-attention has the names of 2022."""
    return any(name.endswith(".query.weight") for name in names)


def torch_name(path: str, old: bool) -> str:
    """`down_blocks.0.attentions.1.to_q.weight` for down_blocks_0/attentions_1/to_q/kernel."""
    if path == "quantize/embedding":
        return "quantize.embedding.weight"
    *modules, leaf = path.split("/")
    modules = [NUMBERED.sub(r"\1.\2", module) for module in modules]
    if len(modules) > 1 and modules[-2].startswith("attentions."):
        new = NEW.get(modules[-1], modules[-1])
        modules[-1] = OLD.get(new, new) if old else new
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def _layout(path: str, x: Any) -> Layout:
    if path.endswith("/embedding"):
        return EMBEDDING
    return {1: VECTOR, 2: DENSE, 4: CONV}[len(x.shape)]
