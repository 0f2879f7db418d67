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


@pytest.fixture(scope="module")
def one_thread():
    r"""Keeps threads from waiting for each other on busy cores, as small sums gain nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_cells(monkeypatch):
    r"""Makes cells of about 96 pixels, with at least 4 rows and at most 16 columns."""
    for name, value in {"_PIXELS": 96, "_ROWS": 4, "_COLUMNS": 16}.items():
        monkeypatch.setattr(f"probnets.coding.cells.{name}", value)


@pytest.fixture
def decodes(monkeypatch):
    r"""Returns the shapes of planes that are decoded while the test runs."""
    from probnets.coding.photographs.planes import decode_planes

    shapes = []

    def spy(model, stream, shape, **options):
        shapes.append(shape)
        return decode_planes(model, stream, shape, **options)

    monkeypatch.setattr("probnets.coding.photographs.codec.decode_planes", spy)
    return shapes
