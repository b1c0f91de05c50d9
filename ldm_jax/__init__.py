"""Latent Diffusion and Stable Diffusion as pure JAX functions and Flax Linen modules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_jax.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # on first use: `from ldm_jax import schema` needs neither JAX nor Orbax
        from ldm_jax.loading import load

        return load
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("ldm-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
