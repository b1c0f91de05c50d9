"""Records, transforms and batches: data without TensorFlow."""
