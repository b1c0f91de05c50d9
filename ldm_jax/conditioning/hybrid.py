"""Text as context, and an image beside the latent (the reference's `hybrid`)."""

from collections.abc import Mapping
from typing import Any

from ldm_jax import schema
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes

Config = schema.HybridCondConfig


def join(kinds: Mapping[type, Kind]) -> Kind:
    """The kind of HybridCondConfig, whose two parts are of other kinds.

    Dropping a caption leaves its image: guidance is away from the empty text on the same image.
    """

    def parts(config: Config) -> tuple[Kind, Kind]:
        return kinds[type(config.text)], kinds[type(config.concat)]

    def example(config: Config, sizes: Sizes) -> dict[str, Example]:
        words, beside = parts(config)
        return words.example(config.text, sizes) | beside.example(config.concat, sizes)

    def from_batch(
        config: Config,
        module: Any,
        params: dict,
        batch: Batch,
        encode: Encode | None,
        dropped: Dropped,
    ) -> Cond:
        words, beside = parts(config)
        text = words.from_batch(config.text, module, params, batch, encode, dropped)
        image = beside.from_batch(config.concat, None, {}, batch, encode, False)
        return image._replace(context=text.context, texts=text.texts)

    def context_width(config: Config) -> tuple[str, int] | None:
        return "cond.text.encoder.width", config.text.encoder.width

    def check(
        config: Config, unet: schema.UNetConfig, first_stage: schema.FirstStageModelConfig, at: str
    ) -> None:
        for kind, name in zip(parts(config), ("text", "concat"), strict=True):
            kind.check(getattr(config, name), unet, first_stage, f"{at}.{name}")

    def check_values(config: Config, batch: Batch) -> None:
        for kind, part in zip(parts(config), (config.text, config.concat), strict=True):
            kind.check_values(part, batch)

    def sampled_by(config: Config) -> str:
        words = parts(config)[1].sampled_by(config.concat)
        return f'{words} --prompt "..."' if words else ""

    return Kind(
        sampled_by=sampled_by,
        name=lambda config: " + ".join(
            kind.name(part)
            for kind, part in zip(parts(config), (config.text, config.concat), strict=True)
        ),
        example=example,
        from_batch=from_batch,
        build=lambda config, dtype, remat: parts(config)[0].build(config.text, dtype, remat),
        module_input=lambda config: parts(config)[0].module_input(config.text),
        context_width=context_width,
        concat_channels=lambda config, latent, image: parts(config)[1].concat_channels(
            config.concat, latent, image
        ),
        label_ids=lambda config: parts(config)[1].label_ids(config.concat),
        check=check,
        check_values=check_values,
    )
