"""The tiny run that tests share: its options, and the config that they give."""


def ldm_flags(first_stage_run, *more) -> list[str]:
    """After `ldm-train tiny:class`: one level, and every draw of a step takes part."""
    flags = f"""--first-stage.path {first_stage_run} --first-stage.scale-images 16
        --unet.channel-mult 1 --unet.scale-shift-norm --unet.dropout 0.1 --steps 24
        --intervals.save 4 --intervals.snapshot 12 --max-to-keep 8"""
    return [*flags.split(), *more]


def ldm_config(first_stage_run, *more):
    """The config that `ldm_flags` and more of them give."""
    from ldm_jax.train import main

    flags = ["--workdir", "unused", *ldm_flags(first_stage_run, *more)]
    return main.parse(main.load_config("tiny:class"), flags, "ldm-train")[1]
