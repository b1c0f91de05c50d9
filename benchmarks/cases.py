"""The cases of `paired.py` as data: shapes, widths and sides, and the numbers they start from."""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from ldm_jax import schema

CONTEXT = (77, 768)  # tokens of a prompt, width of a token
GUIDANCE = 7.5
SCALE = 0.18215  # of Stable Diffusion's latents
LEARNING_RATE = 1e-4  # of every optimizer; AdamW's other values are torch's defaults and ours
# Where a gradient is zero but for rounding, Adam divides rounding by itself. These are above it and
# below the other gradients: of a sum over an image, and of a mean.
EPSILON, DISC_EPSILON = 1e-2, 1e-6
COMPARED = 3  # training steps whose losses are compared
IN_A_ROW = 8  # attentions timed together, each reading the output of the one before
TERMS = ("loss", "nll_loss", "g_loss", "d_weight", "disc_loss")  # of a first stage's step
PIECES = ("autoencoder", "LPIPS", "discriminator")
OUTSIDE = "outside"
"""The kind of an operation that belongs to no network: the optimizer's or the solver's."""
KINDS = ("convolution", "dense", "attention", "norms", "elementwise", "copies", OUTSIDE, "rest")


@dataclasses.dataclass(frozen=True)
class UNet:
    """Forward pass or training step of the UNet; 320 channels are the real width."""

    model_channels: int
    batch: int
    size: int
    """Height and width of the latents."""
    train: bool
    rank: int | None = None
    """Rank of updates of the attentions that train beside frozen weights; None: all weights."""

    def inputs(self) -> dict[str, np.ndarray]:
        """x and target [B, H, W, 4], t int32 [B], context [B, 77, 768]."""
        shape = (self.batch, self.size, self.size, 4)
        return {
            "x": draw("x", shape, 1.7),
            "target": draw("target", shape, 1.7),
            "t": (np.arange(self.batch, dtype=np.int32) * 61 + 500) % 1000,
            "context": draw("context", (self.batch, *CONTEXT), 1.7),
        }


@dataclasses.dataclass(frozen=True)
class Sampling:
    """DDIM steps and decoder, from the text encoder's output to the image."""

    model_channels: int
    batch: int
    size: int
    """Height and width of the latents."""
    steps: int
    guided: bool

    def inputs(self) -> dict[str, np.ndarray]:
        """x_T [B, h, w, 4], context and null [B, 77, 768]."""
        shape, rows = (self.batch, self.size, self.size, 4), (self.batch, *CONTEXT)
        return {
            "x_T": np.random.default_rng(0).standard_normal(shape, dtype=np.float32),
            "context": draw("context", rows, 1.7),
            "null": draw("null", rows, 1.7),
        }


@dataclasses.dataclass(frozen=True)
class Operations:
    """Attention alone at the shapes of sampling cases, and one product of square matrices."""

    attention_of: tuple[str, ...]
    matrix: int
    """Side of the matrices, whose product stands for the machine's peak."""


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """Work on a batch of images with one of `MODELS`."""

    model: str
    batch: int

    @property
    def config(self) -> schema.AutoencoderKLConfig:
        return MODELS[self.model][0]

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return MODELS[self.model][1]

    def images(self) -> np.ndarray:
        """float32 [B, size, size, c] in [-1, 1], a function of the shape alone."""
        return draw("image", (self.batch, self.size, self.size, self.config.in_channels))


class TrainStep(FirstStage):
    """Training step of generator and discriminator."""


class Encode(FirstStage):
    """Images to moments, and from record to shard as `ldm-train encode` does it."""


class LatentTraining(FirstStage):
    """Training step of latent diffusion with its input."""


KL = schema.AutoencoderKLConfig  # kl-f8 by default
MODELS = {
    "demo": (KL(1, 1, channels=32, channel_mult=(1, 2, 2), num_res_blocks=1), 16),
    "reduced": (KL(channels=32), 64),  # kl-f8 at a quarter of its width
    "kl-f4": (KL(channel_mult=(1, 2, 4), z_channels=3, embed_dim=3), 256),
    "kl-f8": (KL(), 256),
}
"""{name: (first stage, side of its images in pixels)}."""
DECODER_CHANNELS = {320: 128, 64: 32, 32: 32}
"""Width of the first stage that goes with a UNet's."""
FAMILIES = {
    "unet": {
        **{f"reduced-forward-{b}": UNet(64, b, 32, train=False) for b in (1, 4, 16)},
        **{f"reduced-training-{b}": UNet(64, b, 32, train=True) for b in (1, 4, 16)},
        "full-forward-1": UNet(320, 1, 64, train=False),
        "full-training-1": UNet(320, 1, 32, train=True),
    },
    "finetune": {
        **{f"finetune-full-{b}": UNet(64, b, 32, train=True) for b in (1, 4)},
        **{f"finetune-lora-{b}": UNet(64, b, 32, train=True, rank=4) for b in (1, 4)},
    },
    "sampling": {
        "full-1": Sampling(320, 1, 64, steps=2, guided=False),
        **{f"reduced-{b}": Sampling(64, b, 32, steps=4, guided=False) for b in (1, 4, 16)},
        "operations": Operations(("full-1", "reduced-1", "reduced-16"), 3072),
        **{f"guided-{b}": Sampling(320, b, 64, steps=50, guided=True) for b in (1, 4, 8, 16)},
        "operations-guided": Operations(("guided-1", "guided-16"), 8192),
        "tiny-2": Sampling(32, 2, 8, steps=2, guided=True),  # to try the script
        "operations-tiny": Operations(("tiny-2",), 256),
    },
    "first_stage": {
        **{f"step-reduced-{b}": TrainStep("reduced", b) for b in (1, 4)},
        "step-kl-f8-1": TrainStep("kl-f8", 1),
        **{f"encode-demo-{b}": Encode("demo", b) for b in (64, 256)},
        **{f"encode-kl-f8-{b}": Encode("kl-f8", b) for b in (1, 4)},
        "train-demo-64": LatentTraining("demo", 64),
        **{f"train-ldm4-{b}": LatentTraining("kl-f4", b) for b in (1, 2)},
    },
}
CASES = {name: case for family in FAMILIES.values() for name, case in family.items()}
DEFAULT = {
    ("sampling", "cpu"): ("full-1", "reduced-1", "reduced-4", "reduced-16", "operations"),
    ("sampling", "gpu"): ("guided-1", "guided-4", "guided-8", "guided-16", "operations-guided"),
}
"""Cases of a family on a platform; all of them where it is not named."""
REPORTS = {
    "unet": "unet_vs_diffusers",
    "finetune": "finetune_vs_peft",
    "sampling": "sampling_{platform}",
}

OURS, DIFFUSERS, TORCH, COMPILED = "ldm_jax", "diffusers", "torch", "torch.compile"
PLAIN, CHANNELS_LAST = "ldm_jax, plain attention", "diffusers, channels_last"
CACHE, IMAGES = "from a cache", "from images"
BESIDE = (PLAIN, CHANNELS_LAST)  # measured once, in the middle of the rounds
_JAX, _STAGE, _TORCH = "side_jax.py", "side_jax_first_stage.py", "side_torch.py"
SIDES = {
    UNet: {
        OURS: (_JAX, "auto"),
        DIFFUSERS: (_TORCH, "contiguous"),
        PLAIN: (_JAX, "xla"),
        CHANNELS_LAST: (_TORCH, "channels_last"),
    },
    Sampling: {OURS: (_JAX, "auto"), TORCH: (_TORCH, "eager"), COMPILED: (_TORCH, "compile")},
    Operations: {OURS: (_JAX, "auto"), TORCH: (_TORCH, "eager")},
    TrainStep: {OURS: (_STAGE, "auto"), TORCH: (_TORCH, "eager")},
    Encode: {OURS: (_STAGE, "auto"), TORCH: (_TORCH, "eager")},
    LatentTraining: {CACHE: (_STAGE, "cache"), IMAGES: (_STAGE, "images")},
}
"""{side: (script, its setting)} of each kind of case; a case's processes run in this order."""
WEIGHTS = {
    UNet: _TORCH,
    Sampling: _TORCH,
    TrainStep: _STAGE,
    Encode: _STAGE,
    LatentTraining: _STAGE,
}
"""The script that writes the files that both sides of a kind of case load."""


def draw(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """float32 U(-scale, scale), a function of the name alone."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    x = random.random(shape, np.float32)
    x -= 0.5
    x *= 2 * scale
    return x


def attention_inputs(case: Operations) -> Iterator[tuple[str, list[np.ndarray]]]:
    """(where, [q, k, v] of [B, tokens, heads, width of a head]) of the attention in its cases."""
    for name in case.attention_of:
        c = CASES[name]
        rows, text, shapes = c.batch * (2 if c.guided else 1), CONTEXT[0], {}
        for level, mult in enumerate((1, 2, 4, 4)):
            tokens, head = (c.size >> level) ** 2, (8, c.model_channels * mult // 8)
            shapes[f"{tokens} tokens"] = rows, tokens, tokens, head
            shapes[f"{tokens} tokens, text"] = rows, tokens, text, head
        shapes["decoder"] = (
            c.batch,
            c.size**2,
            c.size**2,
            (1, DECODER_CHANNELS[c.model_channels] * 4),
        )
        for where, (rows, queries, keys, head) in shapes.items():
            tokens = {"q": queries, "k": keys, "v": keys}
            yield f"{name}, {where}", [draw(x, (rows, n, *head)) for x, n in tokens.items()]


def compared_losses(steps: list[list[float]]) -> np.ndarray:
    """All `TERMS` of the first step, then nll_loss of the next two.

    Rounding grows in the adversary: images changed by 1e-7 of themselves change the third step's
    adaptive weight by 4 % on one side alone.
    """
    nll = TERMS.index("nll_loss")
    return np.array([*steps[0], *(step[nll] for step in steps[1:COMPARED])])
