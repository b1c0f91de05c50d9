"""Every choice that defines a run, as frozen dataclasses that a file in `configs/` fills in.

Class names end in `Config`. A field is *identity* (model, data, objective, optimizer, batch, seed:
changing it makes another run) unless it was made with `execution(...)` (mesh, total steps,
intervals, workers, remat, attention: may change on resume); the mark covers all below the field.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def execution(default: Any) -> Any:
    """A field that may differ when a run is resumed."""
    return field(default=default, metadata={"execution": True})


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TFDSConfig:
    """A TensorFlow Datasets builder, read without TensorFlow from array_record files."""

    name: str = "sklearn_digits"
    """Builder name, with config and version if wanted (`name/config:1.0.0`)."""
    data_dir: str | None = execution(None)
    """Where prepared data lives; default: ~/tensorflow_datasets (or TFDS_DATA_DIR)."""
    split: str = "train"
    """Split that trains."""
    eval_split: str = "test"
    """Split held out for the reported losses and reconstructions."""
    image_key: str = "image"
    """Feature that holds the image."""
    label_key: str | None = "label"
    """Feature that holds the class id; None if there is none."""
    caption_key: str | None = None
    """Text feature with the caption."""
    segmentation_key: str | None = None
    """Image feature whose pixel values are class ids."""


@dataclass(frozen=True)
class FolderConfig:
    """Images in a folder, found recursively, in sorted order."""

    path: str = ""
    """The folder. Its images train."""
    eval_path: str | None = None
    """Folder of held-out images; default: every `eval_every`-th image of `path`."""
    eval_every: int = 20
    """Without eval_path, image number i is held out when i % eval_every == 0."""
    class_from_folder: bool = False
    """The name of the image's folder is its class (sorted names give ids)."""
    captions: Literal["none", "sidecar", "metadata"] = "none"
    """`sidecar`: NAME.txt beside NAME.png; `metadata`: metadata.jsonl (`file_name`, `text`)."""
    segmentation_suffix: str | None = None
    """`_seg`: the class map of cat.jpg is cat_seg.png; maps are not counted as images."""
    mask_suffix: str | None = None
    """`_mask`: the inpainting mask of cat.jpg is cat_mask.png (white = hole)."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Coloured shapes drawn from the record's index: for tests and for timing without input."""

    num_images: int = 256
    """Records in the training split; a quarter as many are held out."""
    size: int = 32
    """Side of a drawn image in pixels."""
    num_classes: int = 4
    """Shapes: the label says which one was drawn."""


SourceConfig = TFDSConfig | FolderConfig | SyntheticConfig


@dataclass(frozen=True)
class DataConfig:
    """Where records come from and what a training image is made of."""

    source: SourceConfig = field(default_factory=SyntheticConfig)
    size: int = 256
    """Side of a training image in pixels."""
    channels: Literal[1, 3] = 3
    """1 reads images as grey."""
    crop: Literal["center", "random", "none"] = "center"
    """The largest centred square; a random square (see crop_range); or the image as it is."""
    crop_range: tuple[float, float] = (0.5, 1.0)
    """Side of a random crop as a share of the short side (the reference's ImageNet: 0.5 to 1)."""
    resize: Literal["area", "bicubic"] = "bicubic"
    """Filter from crop to size: `area` as the reference's ImageNet, `bicubic` as its LSUN."""
    flip: bool = False
    """Mirror half of the training images."""
    allow_upscale: bool = False
    """Accept images smaller than the crop asks for."""
    shuffle: bool = True
    """Reshuffle every epoch."""
    max_bad_records: int = 100
    """Unreadable records after which training stops; each is replaced by the next readable one."""
    threads: int = execution(8)
    """Threads that decode ahead in each process."""
    workers: int = execution(0)
    """Worker processes that decode ahead in each process; 0 uses the threads only."""
    read_ahead: int = execution(4)
    """Batches decoded ahead."""


# --- models -------------------------------------------------------------------------------------


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
    num_heads: int | None = 8
    """Attention heads at every level; give this or num_head_channels."""
    num_head_channels: int | None = None
    """Width of a head; the number of heads then follows the level's width."""
    spatial_transformer: bool = True
    """Transformer blocks with cross-attention; False: plain self-attention blocks."""
    transformer_depth: int = 1
    context_dim: int | None = 768
    """Width of the context tokens; None: the cross-attention attends to the image itself."""
    linear_projection: bool = False
    """proj_in and proj_out are dense layers (Stable Diffusion 2)."""
    scale_shift_norm: bool = False
    """The time embedding scales and shifts the second norm instead of being added."""
    resblock_updown: bool = False
    """Change resolution with residual blocks instead of plain convolutions."""
    num_classes: int | None = None
    """Class ids added to the time embedding (the reference's `adm`); no null class is added."""
    vector_dim: int | None = None
    """Width of a vector added to the time embedding through two dense layers."""
    dropout: float = 0.0


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
    """Share of rows trained with the null class, for classifier-free guidance."""


@dataclass(frozen=True)
class InpaintCondConfig:
    """Concat of the encoded masked image and the mask (`inpainting_big`)."""

    order: Literal["image_mask", "mask_image"] = "image_mask"
    """Channel order after x: LDM puts the masked image first, Stable Diffusion the mask."""
    mask_range: tuple[float, float] = (-1.0, 1.0)
    """Values of (keep, hole) in the mask channel: (-1, 1) in LDM, (0, 1) in Stable Diffusion."""
    fill: float = -1.0
    """Value of the hole in the masked image: black (-1) in LDM, grey (0) in Stable Diffusion."""
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


CondConfig = ClassCondConfig | InpaintCondConfig | SuperResCondConfig | SemanticCondConfig | None


# --- objectives ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstStageLossConfig:
    """Objective of the first stage: reconstruction and KL (`contperceptual.py`)."""

    pixel: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6
    """Weight of the KL, summed over the latent, beside the error summed over the image."""
    logvar_init: float = 0.0
    """Log-variance of the reconstruction; the reference keeps it fixed."""
    learn_logvar: bool = False


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule and training objective (`ddpm.py`)."""

    schedule: Literal["scaled_linear", "linear", "cosine", "sqrt"] = "scaled_linear"
    timesteps: int = 1000
    beta_start: float | None = 8.5e-4
    """First beta; None for the cosine schedule."""
    beta_end: float | None = 0.012
    zero_terminal_snr: bool = False
    """Shift the schedule so that the last level is pure noise (Lin et al. 2023); not with eps."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    loss: Literal["l1", "l2"] = "l2"
    simple_weight: float = 1.0
    """Weight of the simple loss (`l_simple_weight`)."""
    elbo_weight: float = 0.0
    """Weight of the variational bound beside the simple loss (`original_elbo_weight`)."""
    learn_logvar: bool = False
    """Learn one log-variance per timestep."""
    logvar_init: float = 0.0
    min_snr_gamma: float | None = None
    """Clip the loss weight at this SNR (Hang et al. 2023; 5 is usual)."""
    offset_noise: float = 0.0
    """Strength of noise that is constant over an image and channel."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warmed-up learning rate. Defaults are those of torch, as in the reference."""

    learning_rate: float = 1e-4
    """Peak rate, as it is: nothing multiplies it by batch or devices."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What the rate does after the warm-up."""
    warmup_steps: int = 0
    decay_steps: int | None = None
    """Step at which cosine or linear decay ends; needed by both."""
    final_fraction: float = 0.0
    """Rate at the end of the decay over the peak rate."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Applied to every parameter, as the reference does."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None does not clip."""


@dataclass(frozen=True)
class EMAConfig:
    """Moving average of the parameters: min(decay, (1 + n) / (10 + n)) at update n (`ema.py`)."""

    decay: float = 0.9999
    warmup: bool = True
    """False uses `decay` from the first update on."""
    parts: tuple[str, ...] = ("unet", "cond_stage")
    """Parts of the parameters that are averaged; ("unet",) reproduces the reference."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int = -1
    """Copies of the model: the batch is split, the parameters are not."""
    fsdp: int = 1
    """The batch and the parameters are split."""
    tensor: int = 1
    """Attention heads and hidden units are split."""


@dataclass(frozen=True)
class IntervalConfig:
    """Steps between two ...; 0 turns one off."""

    log: int = 10
    """... lines of metrics."""
    save: int = 1000
    """... checkpoints (one is always written at the end and on SIGTERM)."""
    snapshot: int = 10000
    """... snapshots of the EMA weights, kept for good (one is always written at the end)."""
    evaluate: int = 1000
    """... held-out losses."""
    sample: int = 1000
    """... sample grids or reconstructions."""


# --- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """Training of a first stage: `train/autoencoder.py`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderKLConfig = field(default_factory=AutoencoderKLConfig)
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=4.5e-6, b1=0.5, b2=0.9, weight_decay=0.0
        )
    )
    ema: EMAConfig = field(default_factory=lambda: EMAConfig(parts=()))
    """Parts: ("autoencoder",); the reference keeps no average of a first stage."""
    batch_size: int = 12
    """Images per optimizer step, over all devices."""
    seed: int = 23
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters are float32."""
    steps: int = execution(100_000)
    """Optimizer steps in all."""
    accumulate: int = execution(1)
    """Microbatches per step."""
    mesh: MeshConfig = execution(MeshConfig())
    intervals: IntervalConfig = execution(IntervalConfig())
    max_to_keep: int = execution(2)
    """Checkpoints kept."""
    max_bad_steps: int = execution(10)
    """Steps in a row with a non-finite loss after which training stops."""
    eval_batches: int = execution(8)
    """Batches of held-out images per evaluation."""
    num_samples: int = execution(8)
    """Images in a reconstruction picture."""
    remat: bool = execution(False)
    """Recompute activations in the backward pass."""
    attention: Literal["auto", "xla", "chunked", "cudnn"] = execution("auto")
    deterministic: bool = execution(False)
    """Bit-exact resume on GPU too, at a cost in speed."""


@dataclass(frozen=True)
class FirstStageConfig:
    """The frozen first stage of a latent diffusion model."""

    path: str = execution("")
    """Run directory of `ldm-train CONFIG:first_stage`: its newest weights, averaged if it has an
    average. Read at the first start and kept in the run's `frozen/`, so it may move afterwards."""
    scale: float | None = None
    """Factor from latent to diffusion space; None: 1 / std of encoded training images."""
    scale_images: int = 1024
    """Images that 1 / std is computed over."""


@dataclass(frozen=True)
class LatentDiffusionTrainConfig:
    """Training of the latent diffusion model: `train/ldm.py`."""

    data: DataConfig = field(default_factory=DataConfig)
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    cond: CondConfig = None
    """Conditioning; None trains an unconditional model."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    batch_size: int = 64
    """Images per optimizer step, over all devices."""
    seed: int = 23
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters are float32."""
    steps: int = execution(100_000)
    """Optimizer steps in all."""
    accumulate: int = execution(1)
    """Microbatches per step."""
    mesh: MeshConfig = execution(MeshConfig())
    intervals: IntervalConfig = execution(IntervalConfig())
    max_to_keep: int = execution(2)
    """Checkpoints kept."""
    max_bad_steps: int = execution(10)
    """Steps in a row with a non-finite loss after which training stops."""
    eval_batches: int = execution(8)
    """Batches of held-out images per evaluation."""
    num_samples: int = execution(16)
    """Images in a sample grid."""
    sample_steps: int = execution(50)
    sample_guidance: float = execution(1.5)
    """Guidance scale of the sample grid."""
    remat: bool = execution(False)
    """Recompute activations in the backward pass."""
    attention: Literal["auto", "xla", "chunked", "cudnn"] = execution("auto")
    deterministic: bool = execution(False)
    """Bit-exact resume on GPU too, at a cost in speed."""


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What a latent diffusion model is: all that sampling and export need beside the weights."""

    first_stage: AutoencoderKLConfig = field(default_factory=AutoencoderKLConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    cond: CondConfig = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    size: int = 256
    """Side of a training image in pixels: the default side of a sample."""


TrainConfig = AutoencoderTrainConfig | LatentDiffusionTrainConfig
