"""`ldm-eval`: figures of reconstructions and samples, and statistics to compare with."""
