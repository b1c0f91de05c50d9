"""First stages and UNets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """AutoencoderKL of the reference (`ldm/models/autoencoder.py`); defaults are kl-f8."""

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    """Width of the first level (`ch`)."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level over `channels`; each level but the last halves the side."""
    num_res_blocks: int = 2
    attention_downsample: tuple[int, ...] = ()
    """Levels with attention, by downsampling factor (resolution / attn_resolution)."""
    mid_attention: bool = True
    """Attention in the middle block; False is the reference's `attn_type: none`."""
    z_channels: int = 4
    """Channels between encoder and quant_conv."""
    embed_dim: int = 4
    """Channels of the latent."""
    dropout: float = 0.0

    @property
    def downsample(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class AutoencoderVQConfig:
    """VQModel of the reference (`ldm/models/autoencoder.py`); defaults are vq-f4."""

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    """Width of the first level (`ch`)."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Width of each level over `channels`; each level but the last halves the side."""
    num_res_blocks: int = 2
    attention_downsample: tuple[int, ...] = ()
    """Levels with attention, by downsampling factor (resolution / attn_resolution)."""
    mid_attention: bool = True
    """Attention in the middle block; False is the reference's `attn_type: none`."""
    z_channels: int = 3
    """Channels between encoder and quant_conv."""
    embed_dim: int = 3
    """Channels of the latent and of a code."""
    num_codes: int = 8192
    """Codes in the codebook (`n_embed`)."""
    beta: float = 0.25
    """Weight of one of the two terms of the codebook loss; see `legacy`."""
    legacy: bool = True
    """beta weighs the codebook term, as in the reference; False: the commitment term, as meant."""
    codebook_decay: float | None = None
    """The codebook follows its latents by a moving average; None: it follows gradients."""
    dropout: float = 0.0

    @property
    def downsample(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class IdentityFirstStageConfig:
    """No first stage (`IdentityFirstStage`): the diffusion model works on pixels."""

    in_channels: int = 3

    @property
    def out_channels(self) -> int:
        """Channels of a decoded image."""
        return self.in_channels

    @property
    def embed_dim(self) -> int:
        """Channels of a latent."""
        return self.in_channels

    @property
    def downsample(self) -> int:
        """Image side over latent side."""
        return 1


FirstStageModelConfig = AutoencoderKLConfig | AutoencoderVQConfig | IdentityFirstStageConfig


@dataclass(frozen=True)
class UNetConfig:
    """Time-conditional UNet (`openaimodel.py`); defaults are Stable Diffusion v1."""

    in_channels: int = 4
    """Latent channels plus those of concat conditioning."""
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_downsample: tuple[int, ...] = (4, 2, 1)
    """Levels with attention, by downsampling factor (the reference's `attention_resolutions`)."""
    num_heads: int | tuple[int, ...] | None = 8
    """Attention heads at every level, or of each level; give this or num_head_channels."""
    num_head_channels: int | None = None
    """Width of a head; the number of heads then follows the level's width."""
    spatial_transformer: bool = True
    """Transformer blocks with cross-attention; False: plain self-attention blocks."""
    transformer_depth: int = 1
    context_dim: int | None = 768
    """Width of the context tokens; None: the cross-attention attends to the image itself."""
    only_cross_attention: tuple[bool, ...] = ()
    """Levels whose self-attention reads the context instead (`disable_self_attentions`, of the x4
    upscaler); (): none. The middle block is not a level."""
    linear_projection: bool = False
    """proj_in and proj_out are dense layers (Stable Diffusion 2)."""
    upcast_attention: bool = False
    """Queries and keys in float32 whatever the compute type (Stable Diffusion 2.1)."""
    scale_shift_norm: bool = False
    """The time embedding scales and shifts the second norm instead of being added."""
    resblock_updown: bool = False
    """Change resolution with residual blocks instead of plain convolutions."""
    num_classes: int | None = None
    """Class ids added to the time embedding (the reference's `adm`); no null class is added."""
    vector_dim: int | None = None
    """Width of a vector added to the time embedding through two dense layers."""
    dropout: float = 0.0
