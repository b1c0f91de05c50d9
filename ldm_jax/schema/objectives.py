"""Objectives, optimizers, meshes and intervals of a training run."""

from dataclasses import dataclass
from typing import Literal

from ldm_jax.schema.mark import Path


@dataclass(frozen=True)
class FirstStageLossConfig:
    """Objective of the first stage: reconstruction, regularization and adversarial loss.

    With a KL latent errors and KL are summed over an image (`contperceptual.py`), with a quantized
    one errors are averaged (`vqperceptual.py`).
    """

    pixel: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6
    """Weight of the KL, summed over the latent, beside the error summed over the image."""
    logvar_init: float = 0.0
    """Log-variance of the reconstruction, for KL latents; the reference keeps it fixed."""
    learn_logvar: bool = False
    perceptual_weight: float = 0.0
    """Weight of LPIPS, added to the error of every pixel (the reference has 1.0); 0: left out."""
    perceptual_vgg: Path = ""
    """File with the VGG16 whose features LPIPS compares (torch or safetensors), read at the first
    start and kept in the run's `frozen/`; or "random": features of random weights."""
    perceptual_lin: Path = ""
    """File with the weights of LPIPS on those features (`vgg.pth`); none with "random"."""
    codebook_weight: float = 1.0
    """Weight of the codebook's loss, for VQ latents; `model.beta` weighs its terms."""
    revive_codes_after: int = 0
    """Steps without use after which a code moves to a latent of the batch; 0: never."""
    disc_start: int = 50001
    """Optimizer steps before the discriminator trains and its loss counts."""
    disc_weight: float = 0.5
    """Weight of the adversarial term, beside the adaptive one."""
    disc_factor: float = 1.0
    """Weight of both adversarial terms, the autoencoder's and the discriminator's."""
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    lecam_weight: float = 0.0
    """Weight of LeCam regularization of the discriminator (Tseng et al. 2021); 0: off."""
    r1_weight: float = 0.0
    """Weight of the R1 penalty on the discriminator's gradient (Mescheder et al. 2018); 0: off."""
    r1_interval: int = 16
    """Steps between two R1 penalties, each that many times as heavy."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """PatchGAN (`NLayerDiscriminator`): logits of overlapping patches, 70 pixels wide with 3."""

    width: int = 64
    """Channels of the first layer (`ndf`), doubled by each of the next ones up to 8 times."""
    layers: int = 3
    """Strided convolutions (`n_layers`)."""
    norm: Literal["batch", "act"] = "batch"
    """BatchNorm over the global batch, or ActNorm (`use_actnorm`)."""


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
    """Peak rate; not multiplied by the batch size or the number of devices."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the rate after the warm-up."""
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
    """Devices along each axis inside a slice, and slices along it (`dcn_*`).

    A slice is a group of devices on one fast network: a TPU slice, a GPU node. The length of an
    axis is the product of its two sizes. One of the six may be -1: all remaining devices or slices.
    """

    data: int = -1
    """Copies of the model: the batch is split, the parameters are not. -1 takes the slices too,
    where no `dcn_*` gives them to an axis."""
    fsdp: int = 1
    """The batch and the parameters are split."""
    tensor: int = 1
    """Attention heads and hidden units are split."""
    dcn_data: int = 1
    """Slices along `data`: gradients cross the slow network, once a step."""
    dcn_fsdp: int = 1
    """Slices along `fsdp`: parameters cross it, at every layer."""
    dcn_tensor: int = 1
    """Slices along `tensor`: activations cross it, at every layer."""
    process_is_slice: bool = False
    """Take every process as a slice, where devices have no slice index."""


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


@dataclass(frozen=True)
class WatchConfig:
    """Detection of processes that are gone or hang; all in seconds."""

    every: float = 5.0
    """Interval of the heartbeats, small files in the run's `processes/`."""
    timeout: float = 60.0
    """Silence after which a process is lost and the others exit; 0: no watch. JAX itself aborts
    them after 100, without naming the process."""
    stall: float = 600.0
    """Longest time of a training step, at least ten times the longest so far; 0: no limit."""
    pause: float = 3600.0
    """Longest time of the start, a compilation, an evaluation, a picture or a save; 0: no limit."""
