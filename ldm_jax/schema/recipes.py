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

    init_from: Path = execution("")
    """Trained model to start from: a run, a diffusers folder or a checkpoint. Its UNet, condition,
    schedule, prediction, latent scale, first stage and tokenizer become those of the run."""
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    cache: LatentCacheConfig = execution(LatentCacheConfig())
    unet: UNetConfig = field(default_factory=UNetConfig)
    cond: CondConfig = None
    """Conditioning; None trains an unconditional model."""
    cond_learning_rate: float | None = None
    """Peak rate of what the conditioning learns, as a text encoder; None: that of the UNet."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = execution(SamplingConfig())
    num_samples: int = execution(16)
    """Images in a sample grid."""
    sample_steps: int = execution(50)
    sample_guidance: float = execution(1.5)
    """Guidance scale of the sample grid."""
    sample_prompts: tuple[str, ...] = execution(())
    """Texts of the sample grid, which take turns; default: captions of held-out images."""


@dataclass(frozen=True)
class FinetuneTrainConfig(LatentDiffusionTrainConfig):
    """Training of all of a trained model, which `init_from` names: `train/finetune`."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of the kernels of a frozen model (Hu et al. 2021)."""

    rank: int = 4
    alpha: float | None = None
    """The update is scaled by alpha / rank; None: by 1."""
    targets: Literal["attention", "transformer", "all"] = "attention"
    """Kernels with an update: the projections of every attention (as diffusers); every layer of
    the transformers (as kohya); those and the convolutions of the residual blocks."""
    text_encoder: bool = False
    """Update the text encoder as well."""
    dropout: float = 0.0
    """Share of each kernel's inputs that its update does not see in a step; all images of a
    microbatch lose the same."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Distribution of `down`, as in the scripts of diffusers or as in kohya's; `up` is zero."""


@dataclass(frozen=True)
class AdapterTrainConfig(FinetuneTrainConfig):
    """Training of few numbers beside a frozen model."""

    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights; what trains is float32."""
    keep_base: bool = execution(True)
    """Keep the frozen UNet in the run; without it the run needs `init_from` where it was."""


@dataclass(frozen=True)
class LoRATrainConfig(AdapterTrainConfig):
    """Training of a LoRA."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True)
class DreamBoothTrainConfig(AdapterTrainConfig):
    """Training on few pictures of one subject (Ruiz et al. 2023), of all weights or of a LoRA."""

    instance_prompt: str = ""
    """Text of every picture of the subject, with a rare word for it: "a photo of sks dog"."""
    class_prompt: str = ""
    """Text of the pictures that keep the subject's class as it was: "a photo of a dog"; none train
    without it."""
    class_path: Path = execution("")
    """Folder of these pictures; default: `class_images` in the run. The model draws the missing
    ones."""
    num_class_images: int = 200
    prior_weight: float = 1.0
    """Weight of the loss of the class's pictures, of which a step takes as many."""
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(rank=0))
    """With a rank a LoRA trains instead of all weights."""
    train_text_encoder: bool = False
    """Train the text encoder as well; of a LoRA, `lora.text_encoder` says it."""


@dataclass(frozen=True)
class TextualInversionTrainConfig(AdapterTrainConfig):
    """Training of vectors of the text encoder for a new word (Gal et al. 2022)."""

    token: str = "<new>"
    """The new word, in angle brackets."""
    init_word: str = ""
    """A word of one token that the vectors start as: the subject's class, as "dog"."""
    vectors: int = 1
    """Vectors that the word stands for."""
    templates: Literal["object", "style"] = "object"
    """Texts around the word that the pictures are trained with."""
    template_file: Path = ""
    """Texts of your own, one a line, with {} for the word."""


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
