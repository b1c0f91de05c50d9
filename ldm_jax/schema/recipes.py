"""Training recipes, and the config of a trained model."""

from dataclasses import dataclass, field
from typing import Literal

from ldm_jax.schema.conds import CondConfig
from ldm_jax.schema.data import DataConfig
from ldm_jax.schema.mark import Path, execution, later
from ldm_jax.schema.models import (
    AutoencoderKLConfig,
    AutoencoderVQConfig,
    FirstStageModelConfig,
    UNetConfig,
)
from ldm_jax.schema.objectives import (
    DiffusionConfig,
    DiscriminatorConfig,
    EMAConfig,
    FirstStageLossConfig,
    IntervalConfig,
    MeshConfig,
    OptimizerConfig,
    WatchConfig,
)


@dataclass(frozen=True)
class SpikeConfig:
    """Skipping of steps whose gradient is far larger than usual; a skipped step changes nothing."""

    factor: float = 0.0
    """Skip a step whose gradient norm exceeds this times its running mean (10 is a start); 0: off.
    In training of a first stage the discriminator's gradient counts too: either norm skips both."""
    decay: float = 0.99
    """Decay of the running mean over the steps made; the first ones are averaged with equal
    weights."""
    warmup: int = 100
    """Steps that the mean is taken over before any step is skipped."""


@dataclass(frozen=True)
class BaseTrainConfig:
    """Fields that every training recipe has."""

    data: DataConfig = field(default_factory=DataConfig)
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
    watch: WatchConfig = execution(WatchConfig())
    max_to_keep: int = execution(2)
    """Checkpoints kept."""
    max_failed_saves: int = execution(2)
    """Checkpoints in a row that may fail, as on a full disk, before training stops; the last one of
    a run, and one after a signal, may not fail."""
    max_bad_steps: int = execution(10)
    """Steps in a row that may be skipped, as not finite or as spikes, before training stops."""
    spikes: SpikeConfig = execution(SpikeConfig())
    eval_batches: int = execution(8)
    """Batches of held-out images per evaluation."""
    num_samples: int = execution(8)
    """Images in a picture of samples or reconstructions."""
    remat: bool = execution(False)
    """Recompute activations in the backward pass."""
    attention: Literal["auto", "xla", "chunked", "cudnn"] = execution("auto")
    deterministic: bool = execution(False)
    """Bit-exact resume on GPU too, at a cost in speed."""
    profile: str = execution("")
    """FIRST:END: steps to trace into the run's `profile/`; 100:105 are five, after a hundred."""
    wandb: str = execution("")
    """Project of Weights & Biases that metrics and pictures go to as well; wandb is to be
    installed."""


@dataclass(frozen=True)
class AutoencoderTrainConfig(BaseTrainConfig):
    """Training of a first stage: `train/autoencoder`."""

    model: AutoencoderKLConfig | AutoencoderVQConfig = field(default_factory=AutoencoderKLConfig)
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)
    discriminator: DiscriminatorConfig | None = None
    """The adversary; None trains without."""
    init_from: Path = execution("")
    """First stage to start from, of the same shape: a run, a diffusers folder or a checkpoint."""
    train_only: Literal["all", "decoder"] = "all"
    """`decoder` trains decoder and post_quant_conv: the latents stay those of `init_from`."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=4.5e-6, b1=0.5, b2=0.9, weight_decay=0.0
        )
    )
    disc_optimizer: OptimizerConfig | None = None
    """Optimizer of the discriminator; None: the same, with the same rate at every step."""
    ema: EMAConfig = field(default_factory=lambda: EMAConfig(parts=()))
    """Average of the first stage with parts=("autoencoder",); the reference keeps none."""
    batch_size: int = 12
    """Images per optimizer step, over all devices."""


@dataclass(frozen=True)
class FirstStageConfig:
    """The frozen first stage of a latent diffusion model."""

    path: Path = execution("")
    """Run directory of `ldm-train CONFIG:first_stage`: its newest weights, averaged if it has an
    average; a diffusers folder or checkpoint; or "identity", to diffuse pixels. Read at the first
    start and kept in the run's `frozen/`, so it may move afterwards."""
    scale: float | None = None
    """Factor from latent to diffusion space; None: 1 / std of encoded training images."""
    scale_images: int = 1024
    """Number of images that 1 / std is computed over."""


@dataclass(frozen=True)
class LatentCacheConfig:
    """Latents encoded once instead of at every step: `ldm-train encode CONFIG --workdir CACHE`."""

    path: Path = ""
    """Cache to train from; "" encodes the images of every batch."""
    views: int = 1
    """Random crops of an image that `encode` writes, where data.crop is random."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the moments that `encode` writes."""
    records_per_shard: int = 4096
    """Most records in a file that `encode` writes."""


@dataclass(frozen=True)
class SamplingConfig:
    """Default timesteps of a model's sampler."""

    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 1
    """Timestep that `leading` ends at: 1 in the reference, 0 in some pipelines of diffusers."""
    final: Literal["alphas_cumprod_0", "one"] | None = None
    """alphas_cumprod after the last step, that of timestep 0 or one; None: the spacing's
    default."""
    rule: Literal["compvis", "diffusers"] = later("compvis")
    """Rule for the number and places of a spacing's steps: CompVis's samplers (30 steps of
    `leading` are 31), or the schedulers of diffusers, of which each class has its own."""


@dataclass(frozen=True)
class LatentDiffusionTrainConfig(BaseTrainConfig):
    """Training of the latent diffusion model: `train/ldm`."""

    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    cache: LatentCacheConfig = execution(LatentCacheConfig())
    unet: UNetConfig = field(default_factory=UNetConfig)
    cond: CondConfig = None
    """Conditioning; None trains an unconditional model."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = execution(SamplingConfig())
    num_samples: int = execution(16)
    """Images in a sample grid."""
    sample_steps: int = execution(50)
    sample_guidance: float = execution(1.5)
    """Guidance scale of the sample grid."""


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """A latent diffusion model: all that sampling and export need beside the weights."""

    first_stage: FirstStageModelConfig = field(default_factory=AutoencoderKLConfig)
    unet: UNetConfig | None = field(default_factory=UNetConfig)
    """None: a first stage alone."""
    cond: CondConfig = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    size: int = 256
    """Side of a training image in pixels: the default side of a sample."""
    sampling: SamplingConfig = SamplingConfig()


TrainConfig = AutoencoderTrainConfig | LatentDiffusionTrainConfig
