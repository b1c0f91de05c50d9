"""Tables of CompVis names, generated from the model: UNet and first stages."""

from ldm_jax.convert.table import (
    CONV,
    DENSE,
    DENSE_AS_CONV1D,
    DENSE_AS_CONV2D,
    EMBEDDING,
    Entries,
    Entry,
    Layout,
    layer,
    norm,
)
from ldm_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ, FirstStage, IdentityFirstStage
from ldm_jax.models.unet import UNet

# --- UNet ----------------------------------------------------------------------------------------


def unet(model: UNet) -> list[Entry]:
    """Entries of a UNet, names without the prefix `model.diffusion_model.`."""
    return list(_unet(model))


def _unet(model: UNet) -> Entries:
    yield from layer("time_embed.0", "time_embedding/linear_1", DENSE)
    yield from layer("time_embed.2", "time_embedding/linear_2", DENSE)
    if model.num_classes is not None:
        yield Entry("label_emb.weight", ("class_embedding/embedding",), EMBEDDING)
    elif model.vector_dim is not None:
        yield from layer("label_emb.0.0", "class_embedding/linear_1", DENSE)
        yield from layer("label_emb.0.2", "class_embedding/linear_2", DENSE)
    yield from layer("input_blocks.0.0", "conv_in", CONV)
    yield from _down(model)
    yield from _resnet("middle_block.0", "mid_block/resnets_0")
    yield from _attention(model, None, "middle_block.1", "mid_block/attentions_0")
    yield from _resnet("middle_block.2", "mid_block/resnets_1")
    yield from _up(model)
    yield from norm("out.0", "conv_norm_out")
    yield from layer("out.2", "conv_out", CONV)


def _down(model: UNet) -> Entries:
    block = 0  # index in input_blocks, which counts layers and downsamplers alike
    width = model.model_channels
    for level, mult in enumerate(model.channel_mult):
        ours = f"down_blocks_{level}"
        for i in range(model.num_res_blocks):
            block += 1
            before, width = width, model.model_channels * mult
            name = f"input_blocks.{block}"
            yield from _resnet(f"{name}.0", f"{ours}/resnets_{i}", before != width)
            if 2**level in model.attention_downsample:
                yield from _attention(model, level, f"{name}.1", f"{ours}/attentions_{i}")
        if level < len(model.channel_mult) - 1:
            block += 1
            if model.resblock_updown:
                yield from _resnet(f"input_blocks.{block}.0", f"{ours}/downsamplers_0")
            else:
                yield from layer(f"input_blocks.{block}.0.op", f"{ours}/downsamplers_0/conv", CONV)


def _up(model: UNet) -> Entries:
    block = 0
    for order, level in enumerate(reversed(range(len(model.channel_mult)))):
        ours = f"up_blocks_{order}"
        attends = 2**level in model.attention_downsample
        for i in range(model.num_res_blocks + 1):
            name = f"output_blocks.{block}"
            # the skip connection makes the input wider than the output, always
            yield from _resnet(f"{name}.0", f"{ours}/resnets_{i}", shortcut=True)
            if attends:
                yield from _attention(model, level, f"{name}.1", f"{ours}/attentions_{i}")
            block += 1
        if level > 0:
            name = f"{name}.{2 if attends else 1}"  # follows the last layer, in the same block
            if model.resblock_updown:
                yield from _resnet(name, f"{ours}/upsamplers_0")
            else:
                yield from layer(f"{name}.conv", f"{ours}/upsamplers_0/conv", CONV)


def _resnet(torch: str, ours: str, shortcut: bool = False) -> Entries:
    yield from norm(f"{torch}.in_layers.0", f"{ours}/norm1")
    yield from layer(f"{torch}.in_layers.2", f"{ours}/conv1", CONV)
    yield from layer(f"{torch}.emb_layers.1", f"{ours}/time_emb_proj", DENSE)
    yield from norm(f"{torch}.out_layers.0", f"{ours}/norm2")
    yield from layer(f"{torch}.out_layers.3", f"{ours}/conv2", CONV)
    if shortcut:
        yield from layer(f"{torch}.skip_connection", f"{ours}/conv_shortcut", CONV)


def _attention(model: UNet, level: int | None, torch: str, ours: str) -> Entries:
    if not model.spatial_transformer:
        yield from norm(f"{torch}.norm", f"{ours}/group_norm")
        sizes = (("n", model.heads(level)), ("s", 3))  # each head's q, k and v lie together
        for leaf, layout in (
            ("kernel", Layout("(n s d) i 1", "s i (n d)", sizes)),
            ("bias", Layout("(n s d)", "s (n d)", sizes)),
        ):
            paths = tuple(f"{ours}/to_{part}/{leaf}" for part in "qkv")
            yield Entry(f"{torch}.qkv.{'weight' if leaf == 'kernel' else 'bias'}", paths, layout)
        yield from layer(f"{torch}.proj_out", f"{ours}/to_out_0", DENSE_AS_CONV1D)
        return
    projection = DENSE if model.linear_projection else CONV
    yield from norm(f"{torch}.norm", f"{ours}/norm")
    yield from layer(f"{torch}.proj_in", f"{ours}/proj_in", projection)
    for i in range(model.transformer_depth):
        yield from _transformer(f"{torch}.transformer_blocks.{i}", f"{ours}/transformer_blocks_{i}")
    yield from layer(f"{torch}.proj_out", f"{ours}/proj_out", projection)


def _transformer(torch: str, ours: str) -> Entries:
    for attn in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v"):
            yield from layer(f"{torch}.{attn}.{part}", f"{ours}/{attn}/{part}", DENSE, bias=False)
        yield from layer(f"{torch}.{attn}.to_out.0", f"{ours}/{attn}/to_out_0", DENSE)
    yield from layer(f"{torch}.ff.net.0.proj", f"{ours}/ff/net_0/proj", DENSE)
    yield from layer(f"{torch}.ff.net.2", f"{ours}/ff/net_2", DENSE)
    for i in (1, 2, 3):
        yield from norm(f"{torch}.norm{i}", f"{ours}/norm{i}")


# --- first stage ---------------------------------------------------------------------------------


Autoencoder = AutoencoderKL | AutoencoderVQ


def autoencoder(model: FirstStage) -> list[Entry]:
    """Entries of a first stage, names without the prefix `first_stage_model.`."""
    return [] if isinstance(model, IdentityFirstStage) else list(_autoencoder(model))


def _autoencoder(model: Autoencoder) -> Entries:
    if isinstance(model, AutoencoderVQ):
        yield Entry("quantize.embedding.weight", ("quantize/embedding",), EMBEDDING)
    yield from layer("quant_conv", "quant_conv", CONV)
    yield from layer("post_quant_conv", "post_quant_conv", CONV)
    for half in ("encoder", "decoder"):
        yield from layer(f"{half}.conv_in", f"{half}/conv_in", CONV)
        yield from _first_stage_resnet(f"{half}.mid.block_1", f"{half}/mid_block/resnets_0")
        if model.mid_attention:
            yield from _first_stage_attention(
                f"{half}.mid.attn_1", f"{half}/mid_block/attentions_0"
            )
        yield from _first_stage_resnet(f"{half}.mid.block_2", f"{half}/mid_block/resnets_1")
        yield from norm(f"{half}.norm_out", f"{half}/conv_norm_out")
        yield from layer(f"{half}.conv_out", f"{half}/conv_out", CONV)
    last = len(model.channel_mult) - 1
    for level, mult in enumerate(model.channel_mult):
        before = model.channel_mult[max(level - 1, 0)] if level else 1
        torch, ours = f"encoder.down.{level}", f"encoder/down_blocks_{level}"
        yield from _first_stage_level(model, level, torch, ours, before != mult)
        if level < last:
            yield from layer(f"{torch}.downsample.conv", f"{ours}/downsamplers_0/conv", CONV)
        # the reference stores the decoder's levels from the highest resolution to the lowest
        before = model.channel_mult[min(level + 1, last)]
        torch, ours = f"decoder.up.{level}", f"decoder/up_blocks_{last - level}"
        yield from _first_stage_level(model, level, torch, ours, before != mult, extra=1)
        if level > 0:
            yield from layer(f"{torch}.upsample.conv", f"{ours}/upsamplers_0/conv", CONV)


def _first_stage_level(
    model: Autoencoder, level: int, torch: str, ours: str, widens: bool, extra: int = 0
) -> Entries:
    for i in range(model.num_res_blocks + extra):
        shortcut = widens and i == 0
        yield from _first_stage_resnet(f"{torch}.block.{i}", f"{ours}/resnets_{i}", shortcut)
        if 2**level in model.attention_downsample:
            yield from _first_stage_attention(f"{torch}.attn.{i}", f"{ours}/attentions_{i}")


def _first_stage_resnet(torch: str, ours: str, shortcut: bool = False) -> Entries:
    for i in (1, 2):
        yield from norm(f"{torch}.norm{i}", f"{ours}/norm{i}")
        yield from layer(f"{torch}.conv{i}", f"{ours}/conv{i}", CONV)
    if shortcut:
        yield from layer(f"{torch}.nin_shortcut", f"{ours}/conv_shortcut", CONV)


def _first_stage_attention(torch: str, ours: str) -> Entries:
    yield from norm(f"{torch}.norm", f"{ours}/group_norm")
    for theirs, name in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn")):
        yield from layer(f"{torch}.{theirs}", f"{ours}/{name}", DENSE_AS_CONV2D)
