"""What a diffusion model trains on and does not train: first stage, text encoder, tokenizer."""
