"""Figures of merit of samples and reconstructions."""
