"""A latent diffusion model as one frozen bundle: modules, parameters, schedule, scale."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ldm_jax import conditioning, diffusion, latents, schema
from ldm_jax.conditioning import Cond
from ldm_jax.data.tokens import Tokenizer
from ldm_jax.models import attention, autoencoder, blocks, convolution, unet
from ldm_jax.models.autoencoder import FirstStage
from ldm_jax.models.unet import UNet

Params = dict[str, Any]
"""{part: tree of arrays}"""


@dataclasses.dataclass(frozen=True, repr=False)
class LatentDiffusion:
    """Modules and parameters of a model that samples; not a pytree: pass `.params` to jit."""

    unet: UNet | None
    """None in a first stage alone, which encodes and decodes."""
    first_stage: FirstStage
    cond_stage: nn.Module | None
    """None if no conditioning is learned."""
    params: Params
    """{"unet", "first_stage", "cond_stage"}; {} for a part without a module."""
    schedule: diffusion.Schedule
    prediction: diffusion.Prediction
    """Prediction type of the UNet: "eps", "x0" or "v"."""
    latent_scale: float
    config: schema.LatentDiffusionConfig
    tokenizer: Tokenizer | None = None
    """Tokenizer of a model of text; None also where it came without."""
    classes: tuple[str, ...] | None = None
    """Names of the classes by label; None if they have none."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a training image."""
        side = self.config.size // self.config.first_stage.downsample
        return side, side, self.config.first_stage.embed_dim

    def encode(
        self, batch: conditioning.Batch, params: Params | None = None
    ) -> tuple[Cond, Cond | None]:
        """Return (cond, null) of a batch for a sampler; null is None where the model has none.

        batch: {name: [B, ...] array}, see `conditioning.from_batch`; `prompts` makes the batch of a
        model of text. params: as `self.params`, an argument under jit.
        ValueError names an array that is missing, misspelt, no array, or out of range.
        """
        conditioning.check_batch(self.config.cond, batch)
        params = self.params if params is None else params

        def encode(image: jax.Array) -> jax.Array:
            return self.encode_image(image, params)

        given = (self.config.cond, self.cond_stage, params["cond_stage"], batch, encode)
        guides = conditioning.has_null(self.config.cond)
        return conditioning.from_batch(*given), conditioning.null_like(*given) if guides else None

    def encode_image(
        self, images: jax.Array, params: Params | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Scaled latents [B, h, w, z] of images [B, H, W, c] in [-1, 1].

        key: one typed key, or [B] of them: a sample of the posterior; without it the mode.
        """
        params = self.params if params is None else params
        if key is not None and key.ndim == 0:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
        return latents.encode(
            self.first_stage, params["first_stage"], images, self.latent_scale, key
        )

    def decode(self, latent: jax.Array, params: Params | None = None) -> jax.Array:
        """Images [B, H, W, c] in about [-1, 1], not clipped, of scaled latents [B, h, w, z]."""
        params = self.params if params is None else params
        return latents.decode(self.first_stage, params["first_stage"], latent, self.latent_scale)

    def __repr__(self) -> str:
        return "\n  ".join(["LatentDiffusion", *summary(self)])


def summary(model: LatentDiffusion) -> list[str]:
    """A line for each part with its size, and one for the rest."""
    lines = []
    for part in ("unet", "first_stage", "cond_stage"):
        module, leaves = getattr(model, part), jax.tree.leaves(model.params[part])
        line = f"{part}: {'none' if module is None else type(module).__name__}"
        if leaves:
            count = sum(math.prod(x.shape) for x in leaves)
            dtypes = ", ".join(sorted({str(x.dtype) for x in leaves}))
            line += f", {count:,} parameters in {len(leaves)} arrays, {dtypes}"
        lines.append(line)
    tokenizer = model.tokenizer
    facts = [
        f"predicts {model.prediction}",
        f"latent scale {model.latent_scale:g}",
        f"condition: {conditioning.name_of(model.config.cond)}",
        f"tokenizer {'none' if tokenizer is None else type(tokenizer).__name__}",
        f"size {model.config.size}",
    ]
    return [*lines, "; ".join(facts)]


def build(
    config: schema.LatentDiffusionConfig,
    params: dict,
    latent_scale: float,
    *,
    dtype: DTypeLike = jnp.float32,
    attention: Callable | None = None,
    convolution: Callable = convolution.xla,
) -> LatentDiffusion:
    """The bundle of a config: `params` as in `LatentDiffusion.params`.

    `attention` and `convolution` are those of `kernels` for the target devices.
    """
    execution: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        execution["attention"] = attention
    net = None
    if config.unet is not None:
        net = unet.from_config(config.unet, convolution=convolution, **execution)
    return LatentDiffusion(
        unet=net,
        first_stage=autoencoder.from_config(config.first_stage, **execution),
        cond_stage=conditioning.build(config.cond, dtype),
        params=params,
        schedule=diffusion.from_config(config.diffusion),
        prediction=config.diffusion.prediction,
        latent_scale=latent_scale,
        config=config,
    )


def first_stage_alone(
    config: schema.FirstStageModelConfig,
    params: dict,
    latent_scale: float,
    size: int,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LatentDiffusion:
    """A bundle of a first stage alone, which encodes and decodes; its `unet` is None.

    size: side of a training image in pixels.
    """
    whole = schema.LatentDiffusionConfig(first_stage=config, unet=None, size=size)
    parts = {"unet": {}, "first_stage": params, "cond_stage": {}}
    return build(whole, parts, latent_scale, dtype=dtype, **kernels(mesh))


def kernels(mesh: Mesh | None, name: str = "auto") -> dict[str, Callable]:
    """`attention` and `convolution` of `build` for the mesh's devices, or for the default device.

    name: the attention, see `attention.choose`.
    """
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    return {
        "attention": attention.choose(platform, mesh, name),
        "convolution": convolution.choose(platform, mesh),
    }


def model_config(
    config: schema.LatentDiffusionTrainConfig, first_stage: schema.FirstStageModelConfig
) -> schema.LatentDiffusionConfig:
    """The model that a training run makes, on the first stage that it has."""
    return schema.LatentDiffusionConfig(
        first_stage=first_stage,
        unet=config.unet,
        cond=config.cond,
        diffusion=config.diffusion,
        size=config.data.size,
        sampling=config.sampling,
    )


def bind(unet: UNet, params: dict) -> Callable[[jax.Array, jax.Array, Cond], jax.Array]:
    """The UNet as model(x, t, cond) -> raw prediction; concat conditioning joins x's channels.

    Under guidance cond has n times the batch of x: cond[n i] to cond[n i + n - 1] go with x[i].
    """

    def model(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        beside = cond.concat if cond.concat is not None else cond.label
        if beside is not None and len(beside) != len(x):  # for a context the UNet repeats x itself
            x, t = blocks.repeat_for(x, beside), blocks.repeat_for(t, beside)
        if cond.concat is not None:
            x = jnp.concatenate([x, cond.concat.astype(x.dtype)], axis=-1)
        variables: dict[str, Any] = {"params": params}
        if cond.kv_cache is not None:
            variables["context"] = cond.kv_cache
        out: Any = unet.apply(variables, x, t, cond.context, cond.label)
        return out.astype(jnp.float32)

    return model


def with_kv_cache(net: UNet, params: dict, cond: Cond) -> Cond:
    """`cond` with the keys and values that the cross-attentions of a UNet make of its context.

    They depend on the context alone, not on x or t. Computed before the loop over levels they are
    computed once: a branch inside the loop keeps XLA from hoisting them.
    """
    if cond.context is None:
        return cond
    *lead, length, width = cond.context.shape  # one context an image, or several: `Cond.texts`
    context = cond.context.reshape(-1, length, width)
    label = None if cond.label is None else blocks.repeat_for(cond.label, context)
    # A whole call of the UNet, on the smallest image: XLA drops all that only its output needs.
    x, t, _, _ = unet.example_inputs(net)
    x, t = (jnp.broadcast_to(a, (len(context), *a.shape[1:])) for a in (x, t))
    _, made = net.apply({"params": params}, x, t, context, label, mutable=["context"])
    kept = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), made["context"])
    return cond._replace(kv_cache=kept)


def check(config: schema.LatentDiffusionConfig, image_channels: int = 3) -> None:
    """ValueError if the parts of a model do not fit each other, naming both numbers."""
    z, cond, net = config.first_stage.embed_dim, config.cond, config.unet
    if net is None:
        raise ValueError("the config has no unet: it is that of a first stage alone")
    extra = conditioning.concat_channels(cond, z, image_channels)
    if net.in_channels != z + extra:
        raise ValueError(
            f"unet.in_channels is {net.in_channels}, but the latent has {z} channels"
            f" and the conditioning adds {extra}: set it to {z + extra}"
        )
    if net.out_channels != z:
        raise ValueError(f"unet.out_channels is {net.out_channels}, but the latent has {z}")
    _check_context(cond, net)
    kind = conditioning.kind_of(cond)
    kind.check(cond, net, config.first_stage, "cond")
    if net.num_classes is not None and kind.label_ids(cond) is None:
        raise ValueError(
            f"unet.num_classes is {net.num_classes}, but the conditioning gives no label: set it"
            " to None"
        )
    down = config.first_stage.downsample
    if config.size % down:
        raise ValueError(f"data.size {config.size} is not a multiple of the downsampling {down}")


def _check_context(cond: schema.CondConfig, net: schema.UNetConfig) -> None:
    name, width = conditioning.context_width(cond) or ("no context", None)
    if width is not None and not net.spatial_transformer:
        raise ValueError(
            f"unet.spatial_transformer is False, but {name} is {width}: set it to True, which reads"
            " the context"
        )
    given = net.context_dim if net.spatial_transformer else None
    if given != width:
        raise ValueError(
            f"unet.context_dim is {given}, but "
            + (f"{name} is {width}" if width is not None else "the conditioning gives no context")
        )
