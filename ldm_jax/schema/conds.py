"""Kinds of conditioning, with their learned or frozen encoders."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ldm_jax.schema.mark import Path, execution


@dataclass(frozen=True)
class ClassCondConfig:
    """A class id, as one learned context token (ClassEmbedder) or added to the time embedding."""

    num_classes: int = 1000
    """Classes of the data; id num_classes is the null class (the reference's 1001st)."""
    embed_dim: int = 512
    """Width of the token (`context_dim` of the UNet)."""
    via: Literal["context", "label"] = "context"
    """`context`: cross-attention to the embedded class; `label`: the UNet's own class embedding."""
    dropout: float = 0.1
    """Share of examples trained with the null class, for classifier-free guidance."""
    null_class: bool = True
    """The embedding has a null class; without it (`cin256`) there is no guidance."""


@dataclass(frozen=True)
class InpaintCondConfig:
    """Concat of the encoded masked image and the mask (`inpainting_big`)."""

    order: Literal["image_mask", "mask_image"] = "image_mask"
    """Channel order after x: LDM puts the masked image first, Stable Diffusion the mask."""
    mask_range: tuple[float, float] = (-1.0, 1.0)
    """Values of known and masked pixels in the mask: (-1, 1) in LDM, (0, 1) in Stable Diffusion."""
    fill: float = -1.0
    """Value of masked pixels in the image: black (-1) in LDM, grey (0) in Stable Diffusion."""
    dropout: float = 0.0


@dataclass(frozen=True)
class SuperResCondConfig:
    """Concat of the low-resolution image, brought to the latent's size (`bsr_sr`)."""

    factor: int = 4
    """Side of the image over side of the low-resolution image."""
    dropout: float = 0.0


@dataclass(frozen=True)
class SemanticCondConfig:
    """Concat of a segmentation map: one-hot, halved, mapped to few channels (SpatialRescaler)."""

    num_classes: int = 182
    out_channels: int | None = 3
    """Channels after the learned 1x1 convolution; None: no convolution."""
    stages: int = 2
    """Times the map is halved; 2**stages is the first stage's downsampling."""
    dropout: float = 0.0


@dataclass(frozen=True)
class DepthCondConfig:
    """Concat of a depth map at the latent's size, scaled to [-1, 1] per image (`v2-midas`)."""

    dropout: float = 0.0


@dataclass(frozen=True)
class UpscaleCondConfig:
    """Concat of a noised low-resolution image, whose noise level is the label (`x4-upscaling`)."""

    factor: int = 4
    """Side of the image over side of the low-resolution image, which is as large as the latent."""
    max_noise_level: int = 350
    """Largest timestep to which the low-resolution image is noised."""
    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """Schedule of that noise, with `beta_start`, `beta_end` and 1000 timesteps."""
    beta_start: float = 1e-4
    beta_end: float = 0.02
    dropout: float = 0.0


@dataclass(frozen=True)
class CLIPTextConfig:
    """Text transformer of CLIP; defaults are ViT-L/14, the encoder of Stable Diffusion v1."""

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    """Width of a token (`hidden_size`); `context_dim` of the UNet."""
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    """Hidden width of the feed-forward part (`intermediate_size`)."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """`quick_gelu` in OpenAI's weights, `gelu` in OpenCLIP's."""
    layer: Literal["last", "penultimate"] = "last"
    """The block whose output, after the final norm, is the context."""


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Image transformer of CLIP with its projection; defaults are ViT-L/14."""

    image_size: int = 224
    """Side of an image, a multiple of `patch_size`."""
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    """Hidden width of the feed-forward part (`intermediate_size`)."""
    projection_dim: int = 768
    """Width of an image's embedding."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """`quick_gelu` in OpenAI's weights, `gelu` in OpenCLIP's."""


@dataclass(frozen=True)
class BERTTextConfig:
    """Transformer encoder trained from scratch (`BERTEmbedder`); defaults are txt2img-1p4B."""

    vocab_size: int = 30522
    max_length: int = 77
    width: int = 1280
    """Width of a token (`n_embed`); `context_dim` of the UNet."""
    num_layers: int = 32
    num_heads: int = 8
    head_width: int = 64


@dataclass(frozen=True)
class TextCondConfig:
    """Captions, as context tokens of a text encoder."""

    encoder: CLIPTextConfig | BERTTextConfig = field(default_factory=BERTTextConfig)
    trainable: bool = True
    """Train the encoder with the UNet; False takes it, frozen, from `path`."""
    path: Path = execution("")
    """Source of a frozen encoder: a run, a diffusers folder, or a checkpoint. Read at the
    first start and kept in the run's `frozen/`, with its tokenizer."""
    tokenizer: Path = execution("")
    """Folder with tokenizer files as `transformers` writes them, or "bytes" for UTF-8 bytes, which
    needs none; default: the tokenizer found at `path`. Kept in the run's `frozen/`."""
    dropout: float = 0.1
    """Share of captions trained as the empty text, for classifier-free guidance."""


@dataclass(frozen=True)
class LayoutCondConfig:
    """Boxes with classes, as context tokens of a text transformer (`layout2img`).

    An object is three tokens: class, upper left corner, lower right corner on a square grid.
    """

    encoder: BERTTextConfig = field(
        default_factory=lambda: BERTTextConfig(
            vocab_size=8192, max_length=92, width=512, num_layers=16
        )
    )
    dropout: float = 0.0


@dataclass(frozen=True)
class EmbeddingCondConfig:
    """Given vectors as context tokens: CLIP embeddings of the text and of neighbours (RDM)."""

    width: int = 768
    """Width of a vector; `context_dim` of the UNet."""
    dropout: float = 0.0
    """Share of examples trained with zeros."""


@dataclass(frozen=True)
class HybridCondConfig:
    """Text as context, and an image as concat (the reference's `hybrid`)."""

    text: TextCondConfig = field(default_factory=TextCondConfig)
    concat: InpaintCondConfig | DepthCondConfig | UpscaleCondConfig = field(
        default_factory=InpaintCondConfig
    )

    @property
    def dropout(self) -> float:
        """Share of captions trained as the empty text; the image stays."""
        return self.text.dropout


CondConfig = (
    ClassCondConfig
    | InpaintCondConfig
    | SuperResCondConfig
    | SemanticCondConfig
    | TextCondConfig
    | LayoutCondConfig
    | EmbeddingCondConfig
    | HybridCondConfig
    | None
)


def text_of(cond: CondConfig) -> TextCondConfig | None:
    """The text conditioning that a conditioning is or holds, or None."""
    if isinstance(cond, HybridCondConfig):
        return cond.text
    return cond if isinstance(cond, TextCondConfig) else None


def with_text(cond: CondConfig, **changes: Any) -> Any:
    """A conditioning with fields of the text that it is or holds changed; without text, itself."""
    if isinstance(cond, HybridCondConfig):
        return replace(cond, text=replace(cond.text, **changes))
    return replace(cond, **changes) if isinstance(cond, TextCondConfig) else cond
