"""Published checkpoints into our parameter trees, and back."""
