r"""Readers for the data sets that examples, programs and benchmarks use."""

from .digits import Digits as Digits
from .digits import fashion as fashion
from .digits import mnist as mnist
from .digits import read_idx as read_idx
from .folders import folder as folder
from .folders import image_folder as image_folder
