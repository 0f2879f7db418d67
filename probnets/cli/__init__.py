r"""The `probnets` command."""

from .commands import main as main
