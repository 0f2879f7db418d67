r"""The photograph codec: a conditional circuit of pixels given their causal context."""
