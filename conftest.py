r"""Settings of every test, doctests of the library included."""

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

# The same examples everywhere, and no deadline: the first one may compile a loop.
hypothesis.settings.register_profile("probnets", deadline=None, derandomize=True)
hypothesis.settings.load_profile("probnets")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    r"""Seeds each test by itself, and holds it to leave torch's default type as it was."""
    dtype = torch.get_default_dtype()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (other libraries draw from it)
    torch.manual_seed(0)

    yield

    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
        pytest.fail(f"expected the default type to stay {dtype}, and the test changed it")
