"""Small sets of parameters that change a trained model: LoRA, textual inversion."""
