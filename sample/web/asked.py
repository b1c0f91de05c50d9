"""What can be asked of the server, with the names and defaults of stable-diffusion-webui's API.

The page asks with the same classes.
"""

from typing import Any, ClassVar

import pydantic
from pydantic import Field

from ldm_jax.sample.web.limits import Limits, RefusedError

Image = str
"""A picture as base64, with or without `data:image/png;base64,` before it."""


# what webui does not know it leaves aside, and so do we
CONFIG = pydantic.ConfigDict(extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)


SAME = ("automatic", "use same sampler", "use same scheduler", "use same checkpoint")
"""Ways to say that the second pass is as the first."""


class Asked(pydantic.BaseModel):
    """Fields of every request for pictures."""

    # what webui does not know it leaves aside, and so do we
    model_config = pydantic.ConfigDict(
        extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    prompt: str = ""
    """Text; for a model of classes the name or id of one."""
    negative_prompt: str | None = ""
    styles: list[str] | None = None
    seed: int = -1
    """Of the first picture, the others count on; -1 draws one, which `info` tells."""
    subseed: int = -1
    subseed_strength: float = Field(0.0, ge=0, le=1)
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    sampler_name: str | None = None
    scheduler: str | None = None
    sampler_index: str | None = None
    """Old name of `sampler_name`."""
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = Field(7.0, ge=0, le=100)
    """Guidance; at most 1 samples the prompt alone."""
    width: int | None = None
    """Pixels; default: as the model was trained, 512 for Stable Diffusion 1."""
    height: int | None = None
    eta: float | None = Field(None, ge=0, le=1)
    denoising_strength: float | None = Field(0.75, ge=0, le=1)
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool = True
    script_name: str | None = None
    script_args: list[Any] = []
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    save_images: bool = False
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    force_task_id: str | None = None
    infotext: str | None = None
    # features that we do not have, which are refused when they are asked for
    restore_faces: bool | None = None
    tiling: bool | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    disable_extra_networks: bool = False
    comments: dict[str, Any] | None = None

    PICTURES: ClassVar[tuple[str, ...]] = ()
    """Fields that hold pictures."""

    def check(self, limits: Limits) -> None:
        """RefusedError for what is out of bounds, or that we do not have."""
        limits.count(self.batch_size, self.n_iter)
        if not 1 <= self.steps <= limits.steps:
            raise RefusedError(422, f"steps {self.steps} is not in 1..{limits.steps}")
        limits.texts(prompt=self.prompt, negative_prompt=self.negative_prompt or "")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and side < 1:
                raise RefusedError(422, f"{name} {side}: give at least 1 pixel")
        for name in ("seed", "subseed"):
            number = getattr(self, name)
            if not -1 <= number < 2**64 - limits.images:
                raise RefusedError(422, f"{name} {number} is not in -1..2**64 - {limits.images}")
        if self.script_name:
            raise RefusedError(422, f"Script {self.script_name!r:.60} not found: there is none")
        for name in self.alwayson_scripts or ():
            raise RefusedError(422, f"always on script {name!r:.60} not found: there is none")
        for name in ("restore_faces", "tiling", "refiner_checkpoint", "s_churn"):
            if getattr(self, name):
                raise RefusedError(422, f"{name} {getattr(self, name)!r:.60}: is not there yet")


class Txt2Img(Asked):
    """Pictures of a text, of a class, or of nothing in particular."""

    enable_hr: bool = False
    firstphase_width: int = 0
    firstphase_height: int = 0
    hr_scale: float = Field(2.0, ge=1, le=8)
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = Field(0, ge=0)
    hr_resize_x: int = Field(0, ge=0)
    hr_resize_y: int = Field(0, ge=0)
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    firstpass_image: Image | None = None

    def check(self, limits: Limits) -> None:
        """RefusedError for what is out of bounds, or that we do not have."""
        super().check(limits)
        if self.hr_second_pass_steps > limits.steps:
            raise RefusedError(
                422, f"hr_second_pass_steps {self.hr_second_pass_steps} is not in 0..{limits.steps}"
            )
        for name in ("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt",
                     "hr_negative_prompt", "firstpass_image", "firstphase_width"):  # fmt: skip
            value = getattr(self, name)
            if self.enable_hr and value and str(value).casefold() not in SAME:
                raise RefusedError(
                    422, f"{name} {value!r:.60}: the second pass has the first one's"
                )


class Img2Img(Asked):
    """Pictures that begin with a picture, all of it or under a mask."""

    init_images: list[Image] | None = None
    mask: Image | None = None
    resize_mode: int = Field(0, ge=0, le=3)
    """0 just resize, 1 crop and resize, 2 resize and fill, 3 resize the latent."""
    mask_blur: int | None = Field(None, ge=0, le=256)
    """Pixels; default: 4."""
    mask_blur_x: int = Field(4, ge=0, le=256)
    mask_blur_y: int = Field(4, ge=0, le=256)
    mask_round: bool = True
    inpainting_fill: int = Field(0, ge=0, le=3)
    """0 fill, 1 original, 2 latent noise, 3 latent nothing."""
    inpaint_full_res: bool = True
    """Draw only the part around the mask."""
    inpaint_full_res_padding: int = Field(0, ge=0, le=8192)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    initial_noise_multiplier: float | None = None
    image_cfg_scale: float | None = None
    latent_mask: Image | None = None
    include_init_images: bool = False

    PICTURES: ClassVar[tuple[str, ...]] = ("init_images", "mask", "latent_mask")

    def check(self, limits: Limits) -> None:
        """RefusedError for what is out of bounds, or that we do not have."""
        super().check(limits)
        for name, none in (("initial_noise_multiplier", (None, 1)), ("latent_mask", (None, ""))):
            if getattr(self, name) not in none:
                raise RefusedError(422, f"{name}: is not there yet; leave it out")


class Extra(pydantic.BaseModel):
    """Fields of a request to enlarge."""

    model_config = pydantic.ConfigDict(
        extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    resize_mode: int = Field(0, ge=0, le=1)
    """0 by a factor, 1 to a size."""
    upscaling_resize: float = Field(2.0, ge=1, le=8)
    upscaling_resize_w: int = Field(512, ge=1)
    upscaling_resize_h: int = Field(512, ge=1)
    upscaling_crop: bool = True
    """Cut what does not fit the size."""
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = Field(0.0, ge=0, le=1)
    show_extras_results: bool = True
    gfpgan_visibility: float = Field(0.0, ge=0, le=1)
    codeformer_visibility: float = Field(0.0, ge=0, le=1)
    codeformer_weight: float = Field(0.0, ge=0, le=1)
    upscale_first: bool = False

    def check(self, limits: Limits) -> None:
        """RefusedError for what we do not have."""
        for name in ("gfpgan_visibility", "codeformer_visibility"):
            if getattr(self, name):
                raise RefusedError(422, f"{name}: faces are not restored here")


class ExtraSingle(Extra):
    """One picture to enlarge."""

    image: Image = ""


class Named(pydantic.BaseModel):
    """A picture and its name."""

    data: Image = ""
    name: str = ""


class ExtraBatch(Extra):
    """Pictures to enlarge."""

    imageList: list[Named] = []
