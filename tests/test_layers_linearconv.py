r"""Tests for the probnets.layers.linearconv module."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from probnets.layers.haar import Haar
from probnets.layers.linearconv import Composition, LinearConv2d

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT = torch.float64
SIZES = [(1, 1), (2, 3), (7, 4)]


def blocks_of(matrix, channels, size, groups):
    r"""Cuts the diagonal blocks of the Gram out of the whole matrix."""
    pixels, states = math.prod(size), channels // groups
    gram = (matrix.T @ matrix).view(groups, states, pixels, groups, states, pixels)
    rows = [torch.stack([gram[g, :, i, g, :, i] for g in range(groups)]) for i in range(pixels)]
    return torch.stack(rows).view(*size, groups, states, states)


def test_by_hand():
    A = LinearConv2d(1, 1, 2, stride=2, padding=0)
    A.weight.data = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    x = torch.tensor([[[[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]]]])

    assert_close(A(x), torch.tensor([[[[5.0]]]]))
    # No window reaches the third column.
    y = torch.tensor([[[[1.0]]]])
    assert_close(A.adjoint(y, (2, 3)), torch.tensor([[[[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]]]))
    blocks = A.block_gram(1, size=(2, 3))[..., 0, 0, 0]
    assert_close(blocks, torch.tensor([[1.0, 4.0, 0.0], [9.0, 16.0, 0.0]]))
    # (5, 10, 15, 20) is Gram times x, of which (1, 16) is own.
    expected = torch.tensor([[[[4.0, 10.0, 0.0], [15.0, 4.0, 0.0]]]])
    assert_close(A.hollow_gram(x, 1), expected)


def test_is_the_sum_over_taps():
    A = LinearConv2d(2, 3, 3, stride=2, padding=2, dilation=2, dtype=FLOAT)
    x = torch.randn(1, 2, 6, 5, dtype=FLOAT)
    y = torch.zeros(1, 3, *A.out_size((6, 5)), dtype=FLOAT)
    for (r, c), a, b in itertools.product(
        itertools.product(range(y.shape[2]), range(y.shape[3])), range(3), range(3)
    ):
        i, j = 2 * r + 2 * a - 2, 2 * c + 2 * b - 2
        if 0 <= i < 6 and 0 <= j < 5:
            y[0, :, r, c] += A.weight[:, :, a, b] @ x[0, :, i, j]
    assert_close(A(x), y)


@pytest.mark.parametrize("padding", ["full", "same", 0, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_matches_the_dense_matrix(padding, dilation, stride):
    for kernel, size in itertools.product(range(1, 5), SIZES):
        A = LinearConv2d(
            2, 2, kernel, stride=stride, padding=padding, dilation=dilation, dtype=FLOAT
        )
        if min(size) + 2 * A.padding < A.receptive_field:
            with pytest.raises(ValueError, match="pixels or more"):
                A.out_size(size)
            continue
        matrix = A.dense(size)
        y = torch.randn(1, 2, *A.out_size(size), dtype=FLOAT)
        assert_close(A.adjoint(y, size).flatten(), matrix.T @ y.flatten())
        assert_close(A.block_gram(1, size=size), blocks_of(matrix, 2, size, 1))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_full_padding_gives_every_pixel_its_taps(stride, dilation):
    for kernel, size in itertools.product(range(1, 5), SIZES):
        A = LinearConv2d(
            2, 2, kernel, stride=stride, padding="full", dilation=dilation, dtype=FLOAT
        )
        phases = A.block_gram(2)
        blocks = blocks_of(A.dense(size), 2, size, 2)
        for i, j in itertools.product(*map(range, size)):
            assert_close(blocks[i, j], phases[i % stride, j % stride])

        whole = stride * size[0], stride * size[1]
        out = tuple(n + dilation * (kernel - 1) for n in size)
        assert A.out_size(whole) == out


def test_full_padding_is_that_of_the_paper_but_where_it_cuts():
    for kernel, stride in itertools.product(range(1, 8), range(1, 6)):
        paper = math.ceil((stride * (kernel - 2) + kernel) / 2)
        found = LinearConv2d(1, 1, kernel, stride=stride, padding="full").padding
        if kernel == 1 and stride >= 3:
            assert paper < found == 0
        else:
            assert found == paper >= kernel - 1


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_keeps_sizes(kernel, stride):
    for size in range(1, 9):
        out, _ = LinearConv2d(1, 1, kernel, stride=stride).out_size((size, size))
        assert out == (math.ceil(size / stride) if kernel % 2 else size // stride + 1)


@pytest.mark.parametrize("padding", ["full", "same"])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("conv_groups", [1, 2, 3, 6])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_hollow_gram_is_hollow(groups, conv_groups, stride, padding):
    size, states = (3, 4), 6 // groups
    A = LinearConv2d(6, 6, 3, stride=stride, padding=padding, groups=conv_groups, dtype=FLOAT)
    matrix = A.dense(size)
    gram = matrix.T @ matrix
    assert_close(A.block_gram(groups, size=size), blocks_of(matrix, 6, size, groups))

    basis = torch.eye(len(gram), dtype=FLOAT)
    hollow = A.hollow_gram(basis.view(-1, 6, *size), groups).flatten(1)
    assert_close(hollow, hollow.T)
    pixel = torch.arange(len(gram)) % math.prod(size)
    group = torch.arange(len(gram)) // (states * math.prod(size))
    own = (pixel[:, None] == pixel) & (group[:, None] == group)
    assert hollow[own].abs().max() < 1e-14
    assert_close(hollow[~own], gram[~own])


def test_couplings_are_monotone():
    r"""The blocks of two sides scaled to one bound the eigenvalues of the coupling."""
    A = LinearConv2d(4, 3, 3, stride=2, padding="full", dtype=FLOAT)
    norm = torch.linalg.matrix_norm(A.block_gram(2), 2).max()
    A.weight.data /= norm.sqrt()
    basis = torch.eye(4 * 20, dtype=FLOAT).view(-1, 4, 4, 5)
    coupling = -A.hollow_gram(basis, 2).flatten(1)
    assert torch.linalg.eigvalsh(coupling).max() <= 1 + 1e-12


@pytest.mark.parametrize("size", [None, (3, 4)])
def test_blocks_have_gradients(size):
    A = LinearConv2d(4, 2, 3, stride=2, padding="full", dtype=FLOAT)

    def blocks(weight):
        return torch.func.functional_call(_Blocks(A, size), {"layer.weight": weight}, ())

    assert torch.autograd.gradcheck(blocks, (A.weight,))


class _Blocks(torch.nn.Module):
    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self):
        return self.layer.block_gram(2, size=self.size)


def test_an_empty_batch_stays_empty():
    A = LinearConv2d(4, 2, 3, stride=2, padding="full")
    assert A.hollow_gram(torch.zeros(0, 4, 5, 3), 2).shape == (0, 4, 5, 3)


def test_first_weights_keep_the_scale():
    A = LinearConv2d(64, 64, 5, groups=4)
    assert A.fan_in("weight") == 16 * 25
    assert_close(A.weight.std().item(), 1 / 20, rtol=0.02, atol=0)


def test_composition_multiplies_matrices():
    first = LinearConv2d(2, 3, 3, stride=2, padding="full", dtype=FLOAT)
    last = LinearConv2d(3, 4, 2, stride=3, padding=1, dtype=FLOAT)
    A = Composition(first, last)
    size = 5, 6
    between = first.out_size(size)

    assert A.out_size(size) == last.out_size(between)
    assert A.receptive_field == 3 + 1 * 2
    matrix = last.dense(between) @ first.dense(size)
    assert_close(A.dense(size), matrix)
    y = torch.randn(1, 4, *A.out_size(size), dtype=FLOAT)
    assert_close(A.adjoint(y, size).flatten(), matrix.T @ y.flatten())


def test_a_transform_before_keeps_the_norm():
    conv = LinearConv2d(8, 5, 3, dtype=FLOAT)
    A = Composition(Haar(2), conv)
    norms = [torch.linalg.matrix_norm(m, 2) for m in (A.dense((6, 4)), conv.dense((3, 2)))]
    assert_close(*norms)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stride": 0}, "expected stride >= 1, got 0"),
        ({"kernel_size": 0}, "expected kernel_size >= 1 and dilation >= 1, got 0 and 1"),
        ({"groups": 3}, "expected groups that divide 4 and 6 channels, got 3"),
        ({"padding": -1}, "expected padding >= 0, 'same' or 'full', got -1"),
        ({"padding": "valid"}, "expected padding >= 0, 'same' or 'full', got 'valid'"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearConv2d(4, 6, **options)


def test_wrong_inputs():
    A = LinearConv2d(4, 6, 5, padding=1)
    with pytest.raises(ValueError, match="expected maps of 3 x 3 pixels or more, got 2 x 9; take"):
        A(torch.zeros(1, 4, 2, 9))
    with pytest.raises(ValueError, match=r"expected y with shape \(B, 6, 2, 3\), for inputs of"):
        A.adjoint(torch.zeros(1, 6, 3, 3), (4, 5))
    with pytest.raises(ValueError, match=r"expected size=\(H, W\), got None; without full"):
        A.block_gram(2)
    with pytest.raises(ValueError, match="expected groups that divide 4 channels, got 3"):
        A.hollow_gram(torch.zeros(1, 4, 5, 5), 3)
    with pytest.raises(ValueError, match="expected one linear map or more"):
        Composition()
    with pytest.raises(ValueError, match=r"expected a map of 6 channels to follow one .* got 4"):
        Composition(A, A)
