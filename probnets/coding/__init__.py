r"""Placeholder."""
