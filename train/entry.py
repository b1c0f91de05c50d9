"""Train a model, write its data once, or plan its run.

The entry point of `ldm-train`, which a signal stops in order while everything else is imported.
"""

from ldm_jax.train.run import early


def main() -> None:
    """Import and run `ldm_jax.train.main`."""
    early.install()
    from ldm_jax.train import main as command

    command.main()


if __name__ == "__main__":
    main()
