r"""Probabilistic and energy-based models on one tensor backend."""

__version__ = "0.1.0.dev0"

from . import backend as backend
from . import boltzmann as boltzmann
from . import circuits as circuits
from . import coding as coding
from . import data as data
from . import layers as layers
from .coding import compress as compress
from .coding import compress_batch as compress_batch
from .coding import decompress as decompress
from .coding import decompress_batch as decompress_batch
