r"""Promises that can be read off a network of any modules."""

__all__ = ["is_function", "is_per_sample"]

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm


def is_per_sample(module: nn.Module) -> bool:
    r"""Tells whether in evaluation mode no output depends on other samples of the batch.

    A batch norm keeps the promise if it has running statistics. Modules that neither PyTorch
    nor this package defines are trusted.

    Arguments:
        module: The network.

    Example:
        >>> is_per_sample(nn.BatchNorm2d(4))
        True
        >>> is_per_sample(nn.BatchNorm2d(4, track_running_stats=False))
        False
    """
    return all(m.running_mean is not None for m in module.modules() if _is_batch_norm(m))


def is_function(module: nn.Module) -> bool:
    r"""Tells whether the network is a function of one sample and its weights, in any mode.

    Then it has no batch norm, whose outputs in training depend on the other samples and which
    changes its running statistics, and no dropout. Bayesian priors over functions need this.

    Arguments:
        module: The network.

    Example:
        >>> is_function(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))
        True
        >>> is_function(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        False
    """
    return not any(_is_batch_norm(m) or _drops(m) for m in module.modules())


def _is_batch_norm(module: nn.Module) -> bool:
    running = isinstance(module, _InstanceNorm) and module.track_running_stats
    return running or (isinstance(module, _BatchNorm) and not isinstance(module, _InstanceNorm))


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    share = getattr(module, "dropout", 0.0)  # of attention and recurrent networks
    return isinstance(module, nn.RReLU) or (isinstance(share, float) and share > 0)
