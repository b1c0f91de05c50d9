"""Tables that pair the names and layouts of PyTorch checkpoints with ours, used in both directions.

A row says which tensor of the checkpoint (CompVis names) fills which parameters of ours. Our paths
are those of diffusers' Flax models, and torch diffusers' (`.N` written `_N`) where Flax lacks a
part: `class_embedding`, a UNet without cross-attention, `resblock_updown`. Attention at a level of
the first stage is `down_blocks_I/attentions_J` as in torch, with the leaves of Flax's middle block.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import einops
import jax
import numpy as np
from flax import traverse_util

from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.unet import UNet


class Layout(NamedTuple):
    """Axes of a tensor in PyTorch and in ours, as einops writes them, and sizes they need."""

    torch: str
    ours: str
    sizes: tuple[tuple[str, int], ...] = ()

    def to_ours(self, x):
        return _rearrange(x, f"{self.torch} -> {self.ours}", self.sizes)

    def to_torch(self, x):
        return _rearrange(x, f"{self.ours} -> {self.torch}", self.sizes)


def _rearrange(x, pattern: str, sizes: tuple[tuple[str, int], ...]):
    """Of an array, a list of arrays to stack, or the shapes of either."""
    change = functools.partial(einops.rearrange, pattern=pattern, **dict(sizes))
    if isinstance(jax.tree.leaves(x)[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(change, x)
    return change(x)


VECTOR = Layout("c", "c")
EMBEDDING = Layout("n c", "n c")
CONV = Layout("o i h w", "h w i o")
DENSE = Layout("o i", "i o")
DENSE_AS_CONV1D = Layout("o i 1", "i o")
DENSE_AS_CONV2D = Layout("o i 1 1", "i o")


class Row(NamedTuple):
    """One tensor of a checkpoint; with several paths of ours, its first axis there is theirs."""

    torch: str
    ours: tuple[str, ...]
    layout: Layout


Rows = Iterator[Row]


def from_torch(rows: list[Row], state_dict: Mapping[str, Any], shapes: dict) -> dict:
    """Our parameters: nested dict of float32 NumPy arrays, or of shapes if `state_dict` has those.

    state_dict: torch name -> NumPy array or ShapeDtypeStruct; every name is used once.
    shapes: nested dict of what our modules expect (from `jax.eval_shape` of their `init`).
    Raises ValueError that lists missing, unknown and wrongly shaped tensors.
    """
    wanted = _torch_shapes(rows, shapes)
    problems = [f"missing {name}" for name in wanted if name not in state_dict]
    problems += [f"unknown {name}" for name in state_dict if name not in wanted]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    _refuse(problems, "checkpoint does not fit the config")
    flat = {}
    for row in rows:
        x = row.layout.to_ours(_float32(state_dict[row.torch]))
        if len(row.ours) == 1:
            flat[row.ours[0]] = x
        elif isinstance(x, jax.ShapeDtypeStruct):
            flat |= dict.fromkeys(row.ours, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        else:
            flat |= dict(zip(row.ours, x, strict=True))
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(rows: list[Row], params: dict) -> dict[str, Any]:
    """Inverse of `from_torch`: torch name -> NumPy array, or shape where `params` has those.

    Raises ValueError that lists missing and unknown parameters.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    ours = [path for row in rows for path in row.ours]
    problems = [f"missing {path}" for path in ours if path not in flat]
    problems += [f"unknown {path}" for path in sorted(set(flat) - set(ours))]
    _refuse(problems, "parameters do not fit the model")
    return {row.torch: _row_to_torch(row, flat) for row in rows}


def _row_to_torch(row: Row, flat: dict[str, Any]):
    parts = [_float32(flat[path]) for path in row.ours]
    return row.layout.to_torch(parts[0] if len(parts) == 1 else parts)


def _torch_shapes(rows: list[Row], shapes: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in to_torch(rows, shapes).items()}


def _float32(x):
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, np.float32)
    return np.asarray(x, np.float32)


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f", and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:20])}{more}")


# --- layers: a weight, and a bias unless said otherwise ------------------------------------------


def _layer(torch: str, ours: str, layout: Layout, bias: bool = True) -> Rows:
    yield Row(f"{torch}.weight", (f"{ours}/kernel",), layout)
    if bias:
        yield Row(f"{torch}.bias", (f"{ours}/bias",), VECTOR)


def _norm(torch: str, ours: str) -> Rows:
    yield Row(f"{torch}.weight", (f"{ours}/scale",), VECTOR)
    yield Row(f"{torch}.bias", (f"{ours}/bias",), VECTOR)


# --- UNet ----------------------------------------------------------------------------------------


def unet(model: UNet) -> list[Row]:
    """Rows of a UNet, names without the prefix `model.diffusion_model.`."""
    return list(_unet(model))


def _unet(model: UNet) -> Rows:
    yield from _layer("time_embed.0", "time_embedding/linear_1", DENSE)
    yield from _layer("time_embed.2", "time_embedding/linear_2", DENSE)
    if model.num_classes is not None:
        yield Row("label_emb.weight", ("class_embedding/embedding",), EMBEDDING)
    elif model.vector_dim is not None:
        yield from _layer("label_emb.0.0", "class_embedding/linear_1", DENSE)
        yield from _layer("label_emb.0.2", "class_embedding/linear_2", DENSE)
    yield from _layer("input_blocks.0.0", "conv_in", CONV)
    yield from _down(model)
    width = model.model_channels * model.channel_mult[-1]
    yield from _resnet("middle_block.0", "mid_block/resnets_0")
    yield from _attention(model, width, "middle_block.1", "mid_block/attentions_0")
    yield from _resnet("middle_block.2", "mid_block/resnets_1")
    yield from _up(model)
    yield from _norm("out.0", "conv_norm_out")
    yield from _layer("out.2", "conv_out", CONV)


def _down(model: UNet) -> Rows:
    block = 0  # index in input_blocks, which counts layers and downsamplers alike
    width = model.model_channels
    for level, mult in enumerate(model.channel_mult):
        ours = f"down_blocks_{level}"
        for layer in range(model.num_res_blocks):
            block += 1
            before, width = width, model.model_channels * mult
            name = f"input_blocks.{block}"
            yield from _resnet(f"{name}.0", f"{ours}/resnets_{layer}", before != width)
            if 2**level in model.attention_downsample:
                yield from _attention(model, width, f"{name}.1", f"{ours}/attentions_{layer}")
        if level < len(model.channel_mult) - 1:
            block += 1
            if model.resblock_updown:
                yield from _resnet(f"input_blocks.{block}.0", f"{ours}/downsamplers_0")
            else:
                yield from _layer(f"input_blocks.{block}.0.op", f"{ours}/downsamplers_0/conv", CONV)


def _up(model: UNet) -> Rows:
    block = 0
    for i, level in enumerate(reversed(range(len(model.channel_mult)))):
        ours = f"up_blocks_{i}"
        attends = 2**level in model.attention_downsample
        width = model.model_channels * model.channel_mult[level]
        for layer in range(model.num_res_blocks + 1):
            name = f"output_blocks.{block}"
            # the skip connection makes the input wider than the output, always
            yield from _resnet(f"{name}.0", f"{ours}/resnets_{layer}", shortcut=True)
            if attends:
                yield from _attention(model, width, f"{name}.1", f"{ours}/attentions_{layer}")
            block += 1
        if level > 0:
            name = f"{name}.{2 if attends else 1}"  # follows the last layer, in the same block
            if model.resblock_updown:
                yield from _resnet(name, f"{ours}/upsamplers_0")
            else:
                yield from _layer(f"{name}.conv", f"{ours}/upsamplers_0/conv", CONV)


def _resnet(torch: str, ours: str, shortcut: bool = False) -> Rows:
    yield from _norm(f"{torch}.in_layers.0", f"{ours}/norm1")
    yield from _layer(f"{torch}.in_layers.2", f"{ours}/conv1", CONV)
    yield from _layer(f"{torch}.emb_layers.1", f"{ours}/time_emb_proj", DENSE)
    yield from _norm(f"{torch}.out_layers.0", f"{ours}/norm2")
    yield from _layer(f"{torch}.out_layers.3", f"{ours}/conv2", CONV)
    if shortcut:
        yield from _layer(f"{torch}.skip_connection", f"{ours}/conv_shortcut", CONV)


def _attention(model: UNet, width: int, torch: str, ours: str) -> Rows:
    if not model.spatial_transformer:
        yield from _norm(f"{torch}.norm", f"{ours}/group_norm")
        sizes = (("n", model.heads(width)), ("s", 3))  # each head's q, k and v lie together
        for leaf, layout in (
            ("kernel", Layout("(n s d) i 1", "s i (n d)", sizes)),
            ("bias", Layout("(n s d)", "s (n d)", sizes)),
        ):
            paths = tuple(f"{ours}/to_{part}/{leaf}" for part in "qkv")
            yield Row(f"{torch}.qkv.{'weight' if leaf == 'kernel' else 'bias'}", paths, layout)
        yield from _layer(f"{torch}.proj_out", f"{ours}/to_out_0", DENSE_AS_CONV1D)
        return
    projection = DENSE if model.linear_projection else CONV
    yield from _norm(f"{torch}.norm", f"{ours}/norm")
    yield from _layer(f"{torch}.proj_in", f"{ours}/proj_in", projection)
    for i in range(model.transformer_depth):
        yield from _transformer(f"{torch}.transformer_blocks.{i}", f"{ours}/transformer_blocks_{i}")
    yield from _layer(f"{torch}.proj_out", f"{ours}/proj_out", projection)


def _transformer(torch: str, ours: str) -> Rows:
    for attn in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v"):
            yield from _layer(f"{torch}.{attn}.{part}", f"{ours}/{attn}/{part}", DENSE, bias=False)
        yield from _layer(f"{torch}.{attn}.to_out.0", f"{ours}/{attn}/to_out_0", DENSE)
    yield from _layer(f"{torch}.ff.net.0.proj", f"{ours}/ff/net_0/proj", DENSE)
    yield from _layer(f"{torch}.ff.net.2", f"{ours}/ff/net_2", DENSE)
    for i in (1, 2, 3):
        yield from _norm(f"{torch}.norm{i}", f"{ours}/norm{i}")


# --- first stage ---------------------------------------------------------------------------------


def autoencoder(model: AutoencoderKL) -> list[Row]:
    """Rows of a first stage, names without the prefix `first_stage_model.`."""
    return list(_autoencoder(model))


def _autoencoder(model: AutoencoderKL) -> Rows:
    yield from _layer("quant_conv", "quant_conv", CONV)
    yield from _layer("post_quant_conv", "post_quant_conv", CONV)
    for half in ("encoder", "decoder"):
        yield from _layer(f"{half}.conv_in", f"{half}/conv_in", CONV)
        yield from _first_stage_resnet(f"{half}.mid.block_1", f"{half}/mid_block/resnets_0")
        if model.mid_attention:
            yield from _first_stage_attention(
                f"{half}.mid.attn_1", f"{half}/mid_block/attentions_0"
            )
        yield from _first_stage_resnet(f"{half}.mid.block_2", f"{half}/mid_block/resnets_1")
        yield from _norm(f"{half}.norm_out", f"{half}/conv_norm_out")
        yield from _layer(f"{half}.conv_out", f"{half}/conv_out", CONV)
    last = len(model.channel_mult) - 1
    for level, mult in enumerate(model.channel_mult):
        before = model.channel_mult[max(level - 1, 0)] if level else 1
        torch, ours = f"encoder.down.{level}", f"encoder/down_blocks_{level}"
        yield from _first_stage_level(model, level, torch, ours, before != mult)
        if level < last:
            yield from _layer(f"{torch}.downsample.conv", f"{ours}/downsamplers_0/conv", CONV)
        # the reference stores the decoder's levels from the highest resolution to the lowest
        before = model.channel_mult[min(level + 1, last)]
        torch, ours = f"decoder.up.{level}", f"decoder/up_blocks_{last - level}"
        yield from _first_stage_level(model, level, torch, ours, before != mult, extra=1)
        if level > 0:
            yield from _layer(f"{torch}.upsample.conv", f"{ours}/upsamplers_0/conv", CONV)


def _first_stage_level(
    model: AutoencoderKL, level: int, torch: str, ours: str, widens: bool, extra: int = 0
) -> Rows:
    for layer in range(model.num_res_blocks + extra):
        shortcut = widens and layer == 0
        yield from _first_stage_resnet(
            f"{torch}.block.{layer}", f"{ours}/resnets_{layer}", shortcut
        )
        if 2**level in model.attention_downsample:
            yield from _first_stage_attention(f"{torch}.attn.{layer}", f"{ours}/attentions_{layer}")


def _first_stage_resnet(torch: str, ours: str, shortcut: bool = False) -> Rows:
    for i in (1, 2):
        yield from _norm(f"{torch}.norm{i}", f"{ours}/norm{i}")
        yield from _layer(f"{torch}.conv{i}", f"{ours}/conv{i}", CONV)
    if shortcut:
        yield from _layer(f"{torch}.nin_shortcut", f"{ours}/conv_shortcut", CONV)


def _first_stage_attention(torch: str, ours: str) -> Rows:
    yield from _norm(f"{torch}.norm", f"{ours}/group_norm")
    for theirs, name in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn")):
        yield from _layer(f"{torch}.{theirs}", f"{ours}/{name}", DENSE_AS_CONV2D)
