"""The page and the API of stable-diffusion-webui, on one queue before one engine."""
