"""Settings of the server that requests share, or override, by webui's names."""

import threading
from typing import Any

from ldm_jax.sample.web.limits import RefusedError

DEFAULTS: dict[str, Any] = {
    "sd_model_checkpoint": "",
    "CLIP_stop_at_last_layers": 1,
    "randn_source": "NV",
    "emphasis": "Original",
    "eta_noise_seed_delta": 0,
}
"""{name: value at the start}; the model is the first one of the command."""
SOURCES = {"GPU": "nv", "NV": "nv", "CPU": "cpu", "own": "own"}
EMPHASIS = {"Original": "original", "No norm": "no-norm", "Ignore": "ignore", "None": "none"}
FIXED: dict[str, Any] = {
    "sd_vae": "Automatic",
    "samples_format": "png",
    "samples_save": False,
    "grid_save": False,
    "img2img_fix_steps": False,
    "img2img_color_correction": False,
    "face_restoration": False,
    "face_restoration_model": None,
    "enable_pnginfo": True,
    "sd_checkpoint_hash": "",
    "show_progressbar": True,
    "live_previews_enable": True,
    "enable_quantization": False,
    "save_txt": False,
    "send_images": True,
    "comma_padding_backtrack": 20,
    "use_old_scheduling": False,
    "sd_lora": "None",
    "tiling": False,
}
"""{name: the only value}, of settings that clients ask for or send."""
NOTHING = (None, "", "None", "none", "Automatic", "auto")
"""Ways to say that a setting is left as it is."""


class Settings:
    """The settings of a server; threads may share it."""

    def __init__(self, **first: Any) -> None:
        self._values = DEFAULTS | first
        self._lock = threading.Lock()

    def now(self) -> dict[str, Any]:
        """All of them, {name: value}."""
        with self._lock:
            return FIXED | self._values

    def change(self, given: dict[str, Any]) -> None:
        """Change some for all later requests. RefusedError, and none is, if one cannot be."""
        checked = check(given)
        with self._lock:
            self._values = self._values | checked

    def overridden(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """All of them with some others, for one request. RefusedError as `change`."""
        return self.now() | check(given or {})


def check(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that can change. RefusedError for an unknown one, or a wrong value."""
    known: dict[str, Any] = {}
    for name, value in given.items():
        if name in FIXED:
            if value not in NOTHING and value != FIXED[name]:
                raise RefusedError(422, f"{name} {value!r:.60}: only {FIXED[name]!r} is there")
        elif name not in DEFAULTS:
            names = ", ".join(sorted((*DEFAULTS, *FIXED)))
            raise RefusedError(422, f"setting {name!r:.60} is not one of {names}")
        elif name == "CLIP_stop_at_last_layers":
            if type(value) is not int or not 1 <= value <= 12:
                raise RefusedError(422, f"{name} {value!r:.60} is not in 1..12")
            known[name] = value
        elif name == "eta_noise_seed_delta":
            if type(value) is not int or not 0 <= value < 2**32:
                raise RefusedError(422, f"{name} {value!r:.60} is not in 0..2**32 - 1")
            known[name] = value
        elif not isinstance(value, str):
            raise RefusedError(422, f"{name} {value!r:.60}: give a text")
        elif name == "randn_source" and value not in SOURCES:
            raise RefusedError(422, f"{name} {value!r:.60} is not one of {', '.join(SOURCES)}")
        elif name == "emphasis" and value not in EMPHASIS:
            raise RefusedError(422, f"{name} {value!r:.60} is not one of {', '.join(EMPHASIS)}")
        elif value or name != "sd_model_checkpoint":
            known[name] = value
    return known
