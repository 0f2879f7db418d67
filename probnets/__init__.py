r"""Probabilistic and energy-based models on one tensor backend."""

__version__ = "0.1.0.dev0"
