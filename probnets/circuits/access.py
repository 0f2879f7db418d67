r"""Random access to the values of one observation, by paths to the root.

Messages are products of very many probabilities. The compiled loops hold each of their numbers
as a mantissa :math:`m` and an exponent :math:`e`, which stand for :math:`m \, 2^{512 e}`: that
multiplies as fast as plain numbers do, loses nothing, and tells the exact zero from the small.
"""

__all__ = ["PathEvaluator", "path_conditionals", "path_conditionals_torch"]

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from .circuit import TreeCircuit
from .inputs import Discrete
from .queries import leave_one_out
from .structure import Tree

# Numba derives the types of compiled loops.
# pyright: reportMissingParameterType=false

STEP = 512 * math.log(2)  # what one unit of the exponent is worth
UP, DOWN = 2.0**512, 2.0**-512
HIGH, LOW = 2.0**256, 2.0**-256  # where mantissas lie
DEAD = -(2.0**40)  # the exponent of zero


class PathEvaluator:
    r"""Creates an evaluator of one observation that can be changed value by value.

    It keeps the message of every region. A change of one value makes those of the regions
    between it and the root anew, and the distribution of one variable given all others takes
    the same path downwards: both cost as many matrix-vector products as the variable lies deep,
    :math:`O(\log D)` in a balanced tree. The factors of a region are multiplied in a binary
    tree of their own, so that many children cost little and a zero hides nothing.

    Computation is in float64 on the CPU, with the parameters that the circuit has now.

    References:
        | Lossless Compression with Probabilistic Circuits (Liu et al., 2022)
        | https://arxiv.org/abs/2111.11632

    Arguments:
        circuit: The circuit, with :math:`D` variables.
        x: The observation to start from, with shape :math:`(D,)` or the circuit's shape; NaN
            is missing. By default all values are missing.

    Example:
        >>> from probnets.circuits import Categorical, binary_tree
        >>> tree = binary_tree(64)
        >>> evaluator = PathEvaluator(TreeCircuit(tree, Categorical(64, units=4, values=3)))
        >>> evaluator.set(17, 2)
        >>> evaluator.conditional(18).shape, evaluator.products
        (torch.Size([3]), 12)
    """

    products: int
    r"""The number of matrix-vector products so far."""

    def __init__(self, circuit: TreeCircuit, x: Tensor | None = None) -> None:
        own = copy.deepcopy(circuit).cpu().double()
        self._circuit = own
        self._plan = _plan(own)
        nodes = 2 * np.maximum(self._plan.factors, 1).sum()
        self._mantissa = np.ones((nodes, own.units))
        self._exponent = np.zeros((nodes, own.units))
        self.products = 0
        if x is not None:
            self._start(x)

    def _start(self, x: Tensor) -> None:
        x, seen, batch = self._circuit.prepare(x.detach().cpu(), None)
        if batch:
            raise ValueError(f"expected one observation, got a batch of shape {tuple(batch)}")
        plan = self._plan
        with torch.no_grad():
            local = self._circuit.local(x, seen)[0]
        leaves = plan.start[plan.region] + plan.variable_leaf
        self._mantissa[leaves], self._exponent[leaves] = _split(local.numpy())
        self.products += _rise(plan, self._mantissa, self._exponent)

    def set(self, variable: int, value: float) -> None:
        r"""Sets a value, which may have been missing or another one.

        Arguments:
            variable: The variable, counted along the flattened observation.
            value: The value.

        Raises:
            IndexError: If there is no such variable.
            ValueError: If the value is out of range.
        """
        variable = self._check(variable)
        plan, inputs, value = self._plan, self._circuit.inputs, float(value)
        known = plan.table.shape[1]  # values that are in a table
        if 0 <= value < known and value.is_integer():
            mantissa = plan.table[plan.input_group[variable], int(value)]
            exponent = np.where(mantissa > 0, 0.0, DEAD)
            if plan.exponents.size:
                exponent += plan.exponents[plan.input_group[variable], int(value)]
        else:
            x = torch.tensor([[value]], dtype=torch.float64)
            inputs.check(x.flatten())
            group = torch.tensor([int(plan.input_group[variable])])
            with torch.no_grad():
                mantissa, exponent = _split(inputs.log_prob(x, group)[0, 0].numpy())
        self._replace(variable, mantissa, exponent)

    def clear(self, variable: int) -> None:
        r"""Makes a value missing, whether or not it was.

        Arguments:
            variable: The variable, counted along the flattened observation.

        Raises:
            IndexError: If there is no such variable.
        """
        self._replace(self._check(variable), 1.0, 0.0)

    def log_prob(self) -> float:
        r"""Computes the log-likelihood of the values that are set, without any product."""
        return _log_prob(self._plan, self._mantissa, self._exponent)

    def conditional(self, variable: int) -> Tensor:
        r"""Computes the distribution of a variable given all others that are set.

        Whether the variable itself is set makes no difference.

        Arguments:
            variable: The variable, counted along the flattened observation.

        Returns:
            The probabilities of its values, with shape :math:`(X,)`.

        Raises:
            IndexError: If there is no such variable.
            TypeError: If the circuit's inputs are not discrete.
            ValueError: If the other values have probability zero.
        """
        variable = self._check(variable)
        result = np.empty(_values(self._circuit))
        count = _conditional(self._plan, self._mantissa, self._exponent, variable, result)
        self.products += count
        if math.isnan(result[0]):
            raise ValueError(_impossible(""))
        return torch.from_numpy(result)

    def sequence(self, x: Tensor, order: Sequence[int] | np.ndarray | None = None) -> Tensor:
        r"""Computes the distribution of each variable given those before, as one compiled loop.

        See :func:`path_conditionals`. The values of this evaluator stay as they are.

        Arguments:
            x: The observations, with shape :math:`(*, D)` or the circuit's shape.
            order: The order of the variables.

        Returns:
            The probabilities, with shape :math:`(*, D, X)`.
        """
        values = _values(self._circuit)
        x, seen, batch = self._circuit.prepare(x.detach().cpu(), None)
        turns = _order(self._circuit.tree, order)
        rows = np.where(seen.numpy(), x.numpy(), -1).astype(np.int64)

        result = np.empty((*rows.shape, values))
        for n, row in enumerate(rows):
            mantissa, exponent = np.ones_like(self._mantissa), np.zeros_like(self._exponent)
            self.products += _sequence(self._plan, mantissa, exponent, row, turns, result[n])
            if np.isnan(result[n]).any():
                raise ValueError(_impossible(f" in row {n}"))
        return torch.from_numpy(result).view(*batch, *result.shape[1:])

    def _check(self, variable: int) -> int:
        D = self._plan.region.size
        if not 0 <= variable < D:
            raise IndexError(f"expected a variable from 0 to {D - 1}, got {variable}")
        return int(variable)

    def _replace(
        self, variable: int, mantissa: np.ndarray | float, exponent: np.ndarray | float
    ) -> None:
        plan = self._plan
        r, leaf = plan.region[variable], plan.variable_leaf[variable]
        self._mantissa[plan.start[r] + leaf] = mantissa
        self._exponent[plan.start[r] + leaf] = exponent
        self.products += _climb(plan, self._mantissa, self._exponent, r, leaf)


def path_conditionals(
    circuit: TreeCircuit, x: Tensor, order: Sequence[int] | np.ndarray | None = None
) -> Tensor:
    r"""Computes the distribution of each variable given those before it in an order.

    This is the published way to code with circuits: each variable in turn takes its path to the
    root, down for its distribution and up with its value. In a balanced tree a variable costs
    :math:`2 \log_2 D` matrix-vector products, in any order. Where the order may be the tree's
    own, depth-first coding shares the paths and takes two products an edge.

    References:
        | Lossless Compression with Probabilistic Circuits (Liu et al., 2022)
        | https://arxiv.org/abs/2111.11632

    Arguments:
        circuit: The circuit, with discrete inputs.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape. NaN values tell
            those after them nothing.
        order: The order of the variables, a permutation. By default depth first, as they are
            coded.

    Returns:
        For each variable, in the circuit's order, the probabilities of its values in float64,
        with shape :math:`(*, D, X)`.

    Raises:
        TypeError: If the inputs are not discrete.
        ValueError: If an order is no permutation, or values have probability zero.

    Example:
        >>> from probnets.circuits import Categorical, chain
        >>> circuit = TreeCircuit(chain(3), Categorical(3, units=4, values=2))
        >>> path_conditionals(circuit, torch.tensor([1, 0, 1]), [2, 0, 1]).shape
        torch.Size([3, 2])
    """
    _values(circuit)
    return PathEvaluator(circuit).sequence(x, order)


def path_conditionals_torch(
    circuit: TreeCircuit, x: Tensor, order: Sequence[int] | np.ndarray | None = None
) -> Tensor:
    r"""Computes the distribution of each variable given those before it by two passes each.

    This defines what :func:`path_conditionals` computes, in the circuit's own floating point
    type, and takes the time and memory of :math:`D` whole passes.

    Arguments:
        circuit: The circuit, with discrete inputs.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape.
        order: The order of the variables.
    """
    X, D = _values(circuit), circuit.tree.variables
    x, seen, batch = circuit.prepare(x, None)
    rank = torch.from_numpy(_order(circuit.tree, order)).argsort().to(x.device)
    earlier = rank < rank[:, None]
    each = torch.arange(D, device=x.device)
    rows = [
        leave_one_out(circuit, values.expand(D, D), earlier & here)[each, each]
        for values, here in zip(x, seen, strict=True)
    ]
    return torch.stack(rows).view(*batch, D, X)


# ----------------------------------------------------------------------------------------------
# Preparation


class _Plan(NamedTuple):
    r"""What the compiled loops need to know of a circuit.

    The factors of a region, its variables and then its children, are the leaves of a binary
    tree of products: nodes `C` to `2C - 1`, where node `i` is the product of `2i` and
    `2i + 1`, and node 1 of all.
    """

    parent: np.ndarray  # (R,)
    group: np.ndarray  # (R,)
    start: np.ndarray  # (R,) where the nodes of each region begin
    factors: np.ndarray  # (R,) their number C
    region_leaf: np.ndarray  # (R,) the node of each region among those of its parent
    variable_leaf: np.ndarray  # (D,) the node of each variable among those of its region
    region: np.ndarray  # (D,)
    input_group: np.ndarray  # (D,)
    root: np.ndarray  # (2, K) mantissas and exponents
    sums: np.ndarray  # (G, K, K)
    transposed: np.ndarray  # (G, K, K)
    table: np.ndarray  # (H, X, K) mantissas
    exponents: np.ndarray  # (H, X, K), or empty if all are zero


@torch.no_grad()
def _plan(circuit: TreeCircuit) -> _Plan:
    tree = circuit.tree
    owner = np.concatenate([tree.region, tree.parent[1:]])  # the region of each factor
    count = np.bincount(owner, minlength=tree.regions)
    order = np.argsort(owner, kind="stable")
    leaf = np.empty(owner.size, dtype=np.int64)
    leaf[order] = np.arange(owner.size) - (np.cumsum(count) - count)[owner[order]]
    leaf += count[owner]

    size = 2 * np.maximum(count, 1)
    sums = circuit.log_sums().exp().numpy()
    table, exponents = np.zeros((0, 0, 0)), np.zeros((0, 0, 0), np.int32)
    if isinstance(circuit.inputs, Discrete):
        table, shift = _split(circuit.inputs.log_table().numpy())
        shift[table == 0.0] = 0.0
        if shift.any():
            exponents = shift.astype(np.int32)
    return _Plan(
        *(tree.parent, tree.sum_group, np.cumsum(size) - size, count),
        *(np.r_[0, leaf[tree.variables :]], leaf[: tree.variables], tree.region, tree.input_group),
        np.stack(_split(circuit.log_root().numpy())),
        *(np.ascontiguousarray(s) for s in (sums, sums.transpose(0, 2, 1), table, exponents)),
    )


def _split(log: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Turns logarithms into mantissas and exponents."""
    dead = np.isneginf(log)
    exponent = np.where(dead, DEAD, np.rint(log / STEP, where=~dead, out=np.zeros_like(log)))
    return np.where(dead, 0.0, np.exp(np.where(dead, 0.0, log - exponent * STEP))), exponent


def _values(circuit: TreeCircuit) -> int:
    if not isinstance(circuit.inputs, Discrete):
        raise TypeError(f"expected discrete inputs, got {type(circuit.inputs).__name__}")
    return circuit.inputs.values


def _order(tree: Tree, order: Sequence[int] | np.ndarray | None) -> np.ndarray:
    if order is None:
        return tree.by_region[0]
    D = tree.variables
    turns = np.asarray(order)
    if turns.shape != (D,) or not np.array_equal(np.sort(turns), np.arange(D)):
        raise ValueError(f"expected an order of the variables 0 to {D - 1}, got {order}")
    return turns.astype(np.int64)


def _impossible(where: str) -> str:
    return (
        f"expected values of positive probability, got probability zero{where}; "
        "train with a pseudocount to give every value a chance"
    )


# ----------------------------------------------------------------------------------------------
# Compiled loops. In all of them m and e are the mantissas and exponents of all nodes.


@numba.njit(cache=True, nogil=True)
def _times(m1, e1, m2, e2, m, e):  # noqa: ANN001, ANN202
    r"""Multiplies two vectors number by number."""
    for k in range(m.size):
        p, q = m1[k] * m2[k], e1[k] + e2[k]
        high, low = p >= HIGH, p < LOW
        m[k] = p * (DOWN if high else UP if low else 1.0)
        q += 1.0 if high else -1.0 if low else 0.0
        e[k] = q if p > 0.0 else DEAD


@numba.njit(cache=True, nogil=True)
def _align(m, e, plain):  # noqa: ANN001, ANN202
    r"""Brings a vector to one exponent, which is returned.

    What is smaller than the largest number by a factor of :math:`2^{1024}` is lost.
    """
    top = DEAD
    for k in range(m.size):
        top = max(top, e[k])
    for k in range(m.size):
        d = top - e[k]
        plain[k] = m[k] * (UP if d == 0.0 else 1.0 if d == 1.0 else DOWN if d == 2.0 else 0.0)
    return top - 1.0


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _product(rows, plain, top, m, e):  # noqa: ANN001, ANN202
    r"""Computes the sum of rows, weighted by plain numbers of one exponent."""
    K = m.size
    m[:] = 0.0
    for j in range(0, K - 3, 4):  # four at once halve the loads and stores
        a, b, c, d = plain[j], plain[j + 1], plain[j + 2], plain[j + 3]
        for k in range(K):
            m[k] += a * rows[j, k] + b * rows[j + 1, k] + c * rows[j + 2, k] + d * rows[j + 3, k]
    for j in range(K - K % 4, K):
        for k in range(K):
            m[k] += plain[j] * rows[j, k]
    for k in range(K):
        p, q = m[k], top
        for _ in range(2):
            high, low = p >= HIGH, p < LOW
            p *= DOWN if high else UP if low else 1.0
            q += 1.0 if high else -1.0 if low else 0.0
        m[k], e[k] = p, q if p > 0.0 else DEAD


@numba.njit(cache=True, nogil=True)
def _send(plan, m, e, r, plain):  # noqa: ANN001, ANN202
    r"""Sends the message of a region to its parent."""
    node = plan.start[r] + 1
    o = plan.start[plan.parent[r]] + plan.region_leaf[r]
    top = _align(m[node], e[node], plain)
    _product(plan.transposed[plan.group[r]], plain, top, m[o], e[o])


@numba.njit(cache=True, nogil=True)
def _rise(plan, m, e):  # noqa: ANN001, ANN202
    r"""Makes all messages from the leaves, and returns the number of products."""
    plain = np.empty(m.shape[1])
    for r in range(plan.parent.size - 1, -1, -1):
        s = plan.start[r]
        for i in range(plan.factors[r] - 1, 0, -1):
            a, b = s + 2 * i, s + 2 * i + 1
            _times(m[a], e[a], m[b], e[b], m[s + i], e[s + i])
        if r > 0:
            _send(plan, m, e, r, plain)
    return plan.parent.size - 1


@numba.njit(cache=True, nogil=True)
def _climb(plan, m, e, r, i):  # noqa: ANN001, ANN202
    r"""Makes the messages above a node anew, and returns the number of products."""
    plain = np.empty(m.shape[1])
    products = 0
    while True:
        s = plan.start[r]
        while i > 1:
            i >>= 1
            a, b = s + 2 * i, s + 2 * i + 1
            _times(m[a], e[a], m[b], e[b], m[s + i], e[s + i])
        if r == 0:
            return products
        _send(plan, m, e, r, plain)
        i, r = plan.region_leaf[r], plan.parent[r]
        products += 1


@numba.njit(cache=True, nogil=True)
def _others(plan, m, e, r, i, om, oe):  # noqa: ANN001, ANN202
    r"""Multiplies a vector by all factors of a region but one."""
    while i > 1:
        sibling = plan.start[r] + (i ^ 1)
        _times(om, oe, m[sibling], e[sibling], om, oe)
        i >>= 1


@numba.njit(cache=True, nogil=True)
def _conditional(plan, m, e, v, result):  # noqa: ANN001, ANN202
    r"""Fills in the distribution of a variable, and returns the number of products.

    The result begins with NaN if the other values have probability zero.
    """
    K = m.shape[1]
    plain, om, oe = np.empty(K), plan.root[0].copy(), plan.root[1].copy()
    depth, r = 0, plan.region[v]
    while r > 0:
        r = plan.parent[r]
        depth += 1
    path = np.empty(depth + 1, dtype=np.int64)
    r = plan.region[v]
    for t in range(depth, -1, -1):
        path[t] = r
        r = plan.parent[r]

    for t in range(depth):
        child = path[t + 1]
        _others(plan, m, e, path[t], plan.region_leaf[child], om, oe)
        top = _align(om, oe, plain)
        _product(plan.sums[plan.group[child]], plain, top, om, oe)
    _others(plan, m, e, path[depth], plan.variable_leaf[v], om, oe)
    _align(om, oe, plain)

    total = plain.sum()
    if total == 0.0:
        result[0] = np.nan
        return depth
    plain /= total
    _emit(plan, plan.input_group[v], plain, result)
    return depth


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})  # sums in any order
def _emit(plan, g, plain, result):  # noqa: ANN001, ANN202
    r"""Mixes the inputs of a group."""
    _, X, K = plan.table.shape
    small = plan.exponents.size > 0
    for x in range(X):
        total = 0.0
        if small:
            for k in range(K):
                part = plain[k] * plan.table[g, x, k]
                for _ in range(min(-plan.exponents[g, x, k], 3)):  # then it is zero
                    part *= DOWN
                total += part
        else:
            for k in range(K):
                total += plain[k] * plan.table[g, x, k]
        result[x] = total


@numba.njit(cache=True, nogil=True)
def _sequence(plan, m, e, x, order, result):  # noqa: ANN001, ANN202
    r"""Takes the variables in order, and returns the number of products."""
    products = 0
    for v in order:
        products += _conditional(plan, m, e, v, result[v])
        if np.isnan(result[v, 0]):
            return products
        if x[v] >= 0:
            r, g, i = plan.region[v], plan.input_group[v], plan.variable_leaf[v]
            o = plan.start[r] + i
            for k in range(m.shape[1]):
                m[o, k] = plan.table[g, x[v], k]
                e[o, k] = 0.0 if m[o, k] > 0.0 else DEAD
                if plan.exponents.size > 0:
                    e[o, k] += plan.exponents[g, x[v], k]
            products += _climb(plan, m, e, r, i)
    return products


@numba.njit(cache=True, nogil=True)
def _log_prob(plan, m, e):  # noqa: ANN001, ANN202
    r"""Computes the log-likelihood at the root."""
    K = m.shape[1]
    om, oe, plain = np.empty(K), np.empty(K), np.empty(K)
    node = plan.start[0] + 1
    _times(plan.root[0], plan.root[1], m[node], e[node], om, oe)
    top = _align(om, oe, plain)
    total = plain.sum()
    return np.log(total) + STEP * top if total > 0.0 else -np.inf
