"""Images beyond the training size: windows of the model, tiles of the first stage."""
