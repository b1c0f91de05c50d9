"""Every test process: four fake CPU devices, and no silent broadcasting over ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
