"""Data written once before training: latents (`encode`), sharded records (`pack`)."""
