r"""Your own pictures on a trained model: all weights, a LoRA, DreamBooth or a new word.

    ldm-train finetune:full --init-from MODEL --data.source.path IMAGES --workdir runs/mine
    ldm-train finetune:lora --init-from MODEL --data.source.path IMAGES --workdir runs/lora
    ldm-train finetune:dreambooth --init-from MODEL --data.source.path IMAGES --workdir runs/dog \
        --instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog"
    ldm-train finetune:textual_inversion --init-from MODEL --data.source.path IMAGES \
        --workdir runs/word --token "<toy>" --init-word toy
    ldm-train finetune:inpaint ...    # adds the mask's channels to a model of text

MODEL is a run, a diffusers folder or a checkpoint; UNet, condition, schedule, first stage and
tokenizer are its own, and until it is read those of Stable Diffusion v1 stand for them, as in
`ldm-train plan finetune:lora --topology v5e:2x2`. IMAGES holds NAME.txt beside NAME.jpg for `full`,
`lora` and `inpaint`. Rates and steps are those of the examples of diffusers.
"""

import dataclasses

from ldm_jax import schema
from ldm_jax.configs import first_stages, stable_diffusion

FEW = schema.FolderConfig(eval_every=0)  # few pictures, of which none is held out
EVERY = schema.IntervalConfig(log=10, save=250, snapshot=0, evaluate=0, sample=250)


def get_config(stage: str = "full") -> schema.TrainConfig:
    """`full`, `inpaint`, `lora`, `dreambooth` or `textual_inversion`; `first_stage` for plans."""
    stages = {
        "full": full,
        "inpaint": inpaint,
        "lora": lora,
        "dreambooth": dreambooth,
        "textual_inversion": textual_inversion,
    }
    if stage == "first_stage":
        return first_stages.get_config("kl-f8")
    if stage not in stages:
        raise ValueError(f"finetune has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage]()


def full() -> schema.FinetuneTrainConfig:
    """Every weight of the UNet, at a tenth of the rate that it was trained with."""
    return schema.FinetuneTrainConfig(
        **_model(),
        optimizer=schema.OptimizerConfig(learning_rate=1e-5, clip_norm=1.0),
        ema=schema.EMAConfig(parts=("unet",)),
        batch_size=4,
        steps=15_000,
        intervals=dataclasses.replace(EVERY, save=500, evaluate=500, sample=500),
    )


def inpaint() -> schema.FinetuneTrainConfig:
    """`full`, with a mask and the masked image beside the latent, as Stable Diffusion inpainting.

    The new channels start at zero: the first step draws as the model did.
    """
    config = full()
    beside = schema.InpaintCondConfig(order="mask_image", mask_range=(0.0, 1.0), fill=0.0)
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(config.unet, in_channels=9),
        cond=schema.HybridCondConfig(text=config.cond, concat=beside),
    )


def lora() -> schema.LoRATrainConfig:
    """Updates of rank 4 of the attentions: 0.8 M numbers of Stable Diffusion's 860 M."""
    return schema.LoRATrainConfig(
        **_model(),
        optimizer=schema.OptimizerConfig(learning_rate=1e-4, clip_norm=1.0),
        ema=schema.EMAConfig(parts=()),
        batch_size=4,
        steps=15_000,
        intervals=dataclasses.replace(EVERY, save=500, evaluate=500, sample=500),
    )


def dreambooth() -> schema.DreamBoothTrainConfig:
    """Three to five pictures of one subject; `--lora.rank 4` trains a LoRA, at 5e-4 or so."""
    parts = _model()
    parts["data"] = dataclasses.replace(parts["data"], source=FEW)
    return schema.DreamBoothTrainConfig(
        **parts,
        optimizer=schema.OptimizerConfig(learning_rate=5e-6, clip_norm=1.0),
        ema=schema.EMAConfig(parts=()),
        batch_size=1,
        steps=800,
        intervals=EVERY,
    )


def textual_inversion() -> schema.TextualInversionTrainConfig:
    """A new word for three to five pictures: one vector of the text encoder."""
    parts = _model()
    parts["data"] = dataclasses.replace(parts["data"], source=FEW, flip=True)
    return schema.TextualInversionTrainConfig(
        **parts,
        optimizer=schema.OptimizerConfig(learning_rate=5e-4),
        ema=schema.EMAConfig(parts=()),
        batch_size=4,
        steps=3000,
        intervals=EVERY,
    )


def _model() -> dict:
    """Stable Diffusion v1, until `--init-from` says what it is, on all devices."""
    config = stable_diffusion.at_512()
    names = ("data", "first_stage", "unet", "cond", "mesh", "dtype", "sample_guidance")
    return {name: getattr(config, name) for name in names}
