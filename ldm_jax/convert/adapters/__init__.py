"""Files of adapters as others write them: PEFT and diffusers, kohya, LyCORIS."""
