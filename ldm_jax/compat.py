"""Classes under the names of other libraries: `FlaxAutoencoderKL` of diffusers up to 0.39.

Replace `from diffusers import FlaxAutoencoderKL` by
`from ldm_jax.compat import FlaxAutoencoderKL`. Interfaces and quirks are those of that class:
images go in and come out as [B, c, H, W], latents come out as [B, h, w, c].
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax.typing import DTypeLike

from ldm_jax.convert import table
from ldm_jax.convert.diffusers import part_configs, tables
from ldm_jax.convert.formats import files, safetensors_file
from ldm_jax.models import attention, autoencoder, blocks
from ldm_jax.runtime import reading

CONFIG = "config.json"
TORCH = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FLAX = ("diffusion_flax_model.msgpack",)

FIELDS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
)


class Config(dict):
    """A model's configuration: values by key and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the config has no {name!r}; it has {', '.join(self)}")
        return self[name]


@jax.tree_util.register_pytree_node_class
class FlaxDiagonalGaussianDistribution:
    """Normal distribution of latents: `mean`, `logvar`, `std`, `var`, [B, h, w, c] each.

    parameters: mean and log-variance side by side, [B, h, w, 2 c]. Unlike the original it may be
    returned from `jax.jit` and `jax.pmap`.
    """

    def __init__(self, parameters: jax.Array, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic

    @property
    def mean(self) -> jax.Array:
        return jnp.split(self.parameters, 2, axis=-1)[0]

    @property
    def logvar(self) -> jax.Array:
        """In [-30, 20]."""
        return jnp.clip(jnp.split(self.parameters, 2, axis=-1)[1], -30.0, 20.0)

    @property
    def std(self) -> jax.Array:
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> jax.Array:
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(self.logvar)

    def sample(self, key: jax.Array) -> jax.Array:
        """A draw, [B, h, w, c]."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)

    def mode(self) -> jax.Array:
        """The mean."""
        return self.mean

    def kl(self, other: "FlaxDiagonalGaussianDistribution | None" = None) -> jax.Array:
        """KL divergence from `other`, by default from the unit normal: [B]."""
        if self.deterministic:
            return jnp.array([0.0])
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = jnp.square(self.mean - other.mean) / other.var + self.var / other.var
            terms += other.logvar - self.logvar - 1.0
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))

    def nll(self, sample: jax.Array, axis: tuple[int, ...] = (1, 2, 3)) -> jax.Array:
        """Negative log-likelihood of a sample, summed over `axis`."""
        if self.deterministic:
            return jnp.array([0.0])
        error = jnp.square(sample - self.mean) / self.var
        return 0.5 * jnp.sum(np.log(2.0 * np.pi) + self.logvar + error, axis=tuple(axis))

    def tree_flatten(self) -> tuple[tuple, bool]:
        return (self.parameters,), self.deterministic

    @classmethod
    def tree_unflatten(cls, deterministic: bool, children: tuple) -> Any:
        return cls(*children, deterministic)


class FlaxAutoencoderKLOutput(NamedTuple):
    """Result of `encode`."""

    latent_dist: FlaxDiagonalGaussianDistribution


class FlaxDecoderOutput(NamedTuple):
    """Result of `decode`: images [B, c, H, W]."""

    sample: jax.Array


class FlaxAutoencoderKL(nn.Module):
    """The KL autoencoder under the name, options and methods of diffusers' Flax class.

    Its parameters are those of `models.autoencoder.AutoencoderKL`, name for name. `dtype` is the
    compute type.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        options = {"_class_name": "AutoencoderKL", **self.config}
        config, _ = part_configs.first_stage_config(options, "FlaxAutoencoderKL")
        both = {
            "channels": config.channels,
            "channel_mult": config.channel_mult,
            "num_res_blocks": config.num_res_blocks,
            "attention_downsample": config.attention_downsample,
            "mid_attention": True,
            "dtype": self.dtype,
            "attention": attention.xla,
        }
        z, numerics = self.latent_channels, {"dtype": self.dtype}
        self.encoder = autoencoder.Encoder(out_channels=2 * z, **both)
        self.decoder = autoencoder.Decoder(out_channels=self.out_channels, **both)
        self.quant_conv = blocks.conv(2 * z, 2 * z, 1, **numerics)
        self.post_quant_conv = blocks.conv(z, z, 1, **numerics)

    @property
    def config(self) -> Config:
        """The options, as `config.scaling_factor` and `config["scaling_factor"]`."""
        return Config({name: getattr(self, name) for name in FIELDS})

    def encode(self, sample: jax.Array, deterministic: bool = True, return_dict: bool = True):
        """`.latent_dist` of images [B, c, H, W] in [-1, 1]; without return_dict a tuple of it."""
        x = jnp.transpose(sample, (0, 2, 3, 1))
        moments = self.quant_conv(self.encoder(x, train=not deterministic))
        out = FlaxAutoencoderKLOutput(FlaxDiagonalGaussianDistribution(moments))
        return out if return_dict else tuple(out)

    def decode(self, latents: jax.Array, deterministic: bool = True, return_dict: bool = True):
        """`.sample`, images [B, c, H, W], of unscaled latents; [B, h, w, c] or [B, c, h, w]."""
        if latents.shape[-1] != self.latent_channels:
            latents = jnp.transpose(latents, (0, 2, 3, 1))
        image = self.decoder(self.post_quant_conv(latents), train=not deterministic)
        out = FlaxDecoderOutput(jnp.transpose(image, (0, 3, 1, 2)))
        return out if return_dict else tuple(out)

    def __call__(
        self,
        sample: jax.Array,
        sample_posterior: bool = False,
        deterministic: bool = True,
        return_dict: bool = True,
    ):
        """Encode and decode images; a drawn latent needs the generator "gaussian"."""
        posterior = self.encode(sample, deterministic=deterministic).latent_dist
        z = posterior.sample(self.make_rng("gaussian")) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def init_weights(self, rng: jax.Array) -> dict:
        """Fresh parameters."""
        image = jnp.zeros((1, self.in_channels, self.sample_size, self.sample_size))
        return self.init({"params": rng}, image)["params"]

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | epath.PathLike, dtype: DTypeLike = jnp.float32
    ) -> "FlaxAutoencoderKL":
        """The model of a config.json, its content, or the folder that holds it."""
        where = "config"
        if not isinstance(config, Mapping):
            where = epath.Path(config)
            where = where / CONFIG if where.is_dir() else where
            config = reading.read_object(where)
        # refuses the options that the Flax class could not build either
        part_configs.first_stage_config({**config, "_class_name": "AutoencoderKL"}, str(where))
        options = {name: config[name] for name in FIELDS if name in config}
        lists = {name: tuple(x) for name, x in options.items() if isinstance(x, list)}
        return cls(**options | lists, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: epath.PathLike,
        dtype: DTypeLike = jnp.float32,
        *,
        subfolder: str | None = None,
        from_pt: bool = False,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = True,
        use_safetensors: bool | None = None,
    ) -> tuple["FlaxAutoencoderKL", dict]:
        """(model, parameters) of a folder with config.json and weights of Flax or torch.

        A name like "owner/name" is looked up in the cache of huggingface_hub; nothing is
        downloaded. Flax weights are taken first, with `from_pt` torch's; the parameters keep the
        file's type. `local_files_only` and `use_safetensors` are accepted for old
        calls. FileNotFoundError names the files that were looked for.
        """
        del local_files_only, use_safetensors
        folder = _folder(pretrained_model_name_or_path, revision, cache_dir)
        folder = folder / subfolder if subfolder else folder
        if not (folder / CONFIG).exists():
            hint = ' (give subfolder="vae"?)' if (folder / "model_index.json").exists() else ""
            raise FileNotFoundError(f"{folder}: holds no {CONFIG}{hint}")
        model = cls.from_config(folder, dtype=dtype)
        names = [*TORCH, *FLAX] if from_pt else [*FLAX, *TORCH]
        if variant is not None:
            names = [re.sub(r"(\.\w+)$", rf".{variant}\1", name) for name in names]
        weights_file = next((folder / name for name in names if (folder / name).exists()), None)
        if weights_file is None:
            raise FileNotFoundError(f"{folder}: holds none of {', '.join(names)}")
        return model, _read(model, weights_file)

    def save_pretrained(self, save_directory: epath.PathLike, params: dict) -> None:
        """Writes config.json and safetensors that torch diffusers' AutoencoderKL loads."""
        folder = epath.Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"_class_name": "AutoencoderKL", **self.config}
        (folder / CONFIG).write_text(json.dumps(options, indent=2) + "\n")
        tensors = table.to_torch(tables.entries(_shapes(self)), params, lazy=True)
        safetensors_file.write(folder / TORCH[0], tensors, {"format": "pt"})

    @staticmethod
    def to_bf16(params: dict) -> dict:
        """The parameters in bfloat16."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)

    @staticmethod
    def to_fp16(params: dict) -> dict:
        """The parameters in float16."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), params)

    @staticmethod
    def to_fp32(params: dict) -> dict:
        """The parameters in float32."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def _shapes(model: FlaxAutoencoderKL) -> dict:
    return jax.eval_shape(model.init_weights, jax.random.key(0))


def _read(model: FlaxAutoencoderKL, path: epath.Path) -> dict:
    """The parameters in a weights file, in the type they have there."""
    shapes = _shapes(model)
    tensors, info = files.open_state_dict(path)
    if info.format == "msgpack":
        entries = tables.flax_entries(shapes)
    else:
        entries = tables.entries(shapes, old=tables.has_old_names(tensors))
    dtype = next((x.dtype for x in tensors.values()), np.dtype(np.float32))
    place = table.placer(shapes, None)
    return table.from_torch(entries, tensors, shapes, dtype=dtype, place=place, where=str(path))


def _folder(name: epath.PathLike, revision: str | None, cache_dir: str | None) -> epath.Path:
    """A local folder, or that of a model in the cache of huggingface_hub."""
    folder = epath.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        import huggingface_hub

        try:
            snapshot = huggingface_hub.snapshot_download(
                str(name), revision=revision, cache_dir=cache_dir, local_files_only=True
            )
            return epath.Path(snapshot)
        except OSError as error:  # LocalEntryNotFoundError is one
            raise FileNotFoundError(
                f"{name}: is neither a folder nor in the cache of huggingface_hub, and nothing is"
                f" downloaded here: run `hf download {name}` first"
            ) from error
    raise FileNotFoundError(f"{folder}: is not a folder")
