r"""Options and fixtures of the test suite."""

import pytest
import torch

from probnets import data


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device of tests that take one")


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def data_folder():
    try:
        return data.folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
