r"""Rows of numbers that a compiled loop keeps in vector registers.

LLVM does not reliably vectorise short loops over the units of a model. These operations state
the vectors instead: a :class:`RowType` value holds `W` neighbouring numbers, `W` being a constant
of the compiled loop. They work only inside functions compiled by Numba. Indices are flat and are
**not** checked: the Python side of a loop checks them.

The operators ``+``, ``-``, ``*`` and ``/`` act number by number and round each result, so that
they give the same bits everywhere. :func:`multiply_add` and what is built on it may round once
instead of twice; code whose bits matter keeps such sums exact.
"""

__all__ = [
    "add_products",
    "clear",
    "fill",
    "floor",
    "larger",
    "load",
    "multiply_add",
    "peek",
    "power_of_two",
    "row_max",
    "row_sum",
    "smaller",
    "store",
    "width",
]

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_model

# pyright: reportMissingParameterType=false


def width(units: int, *, itemsize: int) -> int:
    r"""Returns the row width `W` that suits a number of units, and divides it.

    Four rows of at most 256 bytes fit the registers of AVX-512 and are still handled well
    by shorter vectors.

    Arguments:
        units: The number of units :math:`K`.
        itemsize: The size of a number in bytes.

    Example:
        >>> width(32, itemsize=4), width(96, itemsize=8), width(7, itemsize=8)
        (32, 32, 7)
    """
    most = 256 // itemsize
    powers = [w for w in (64, 32, 16, 8) if w <= most and units % w == 0]
    if powers:
        return powers[0]
    return next(w for w in range(min(units, most), 0, -1) if units % w == 0)


class RowType(types.Type):
    r"""Is the Numba type of a row of `width` floating-point numbers."""

    def __init__(self, dtype: types.Float, width: int) -> None:
        self.dtype = dtype
        self.width = width
        super().__init__(name=f"Row({dtype}, {width})")


@register_model(RowType)
class RowModel(models.PrimitiveModel):
    r"""Represents a row as an LLVM vector."""

    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _vector(kind))


def _vector(kind: RowType) -> ir.VectorType:
    return ir.VectorType(
        ir.FloatType() if kind.dtype == types.float32 else ir.DoubleType(), kind.width
    )


def _pointer(context, builder, kind, array, index):
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _intrinsic(*, literal: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    r"""Makes an intrinsic, which is called without the typing context it is written with."""
    return intrinsic(prefer_literal=literal)


@_intrinsic(literal=True)
def load(typing, array, index, width):
    r"""Loads the row that starts at a flat index. Integers become float64."""
    dtype = array.dtype if isinstance(array.dtype, types.Float) else types.float64
    row = RowType(dtype, width.literal_value)

    def codegen(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        item = context.get_value_type(array.dtype)
        vector = ir.VectorType(item, row.width)
        value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
        value.align = array.dtype.bitwidth // 8
        return (
            value if isinstance(array.dtype, types.Float) else builder.sitofp(value, _vector(row))
        )

    return row(array, types.intp, width), codegen


@_intrinsic()
def store(typing, array, index, row):
    r"""Stores a row at a flat index of an array of the same type."""
    if not isinstance(row, RowType) or array.dtype != row.dtype:
        return None

    def codegen(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        pointer = builder.bitcast(pointer, _vector(row).as_pointer())
        builder.store(arguments[2], pointer).align = row.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, row), codegen


@_intrinsic()
def peek(typing, array, index):
    r"""Loads one number at a flat index."""

    def codegen(context, builder, signature, arguments):
        return builder.load(
            _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        )

    return array.dtype(array, types.intp), codegen


@_intrinsic(literal=True)
def fill(typing, value, width):
    r"""Repeats one number along a row."""
    row = RowType(value, width.literal_value)

    def codegen(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        empty = ir.Constant(_vector(row), ir.Undefined)
        first = builder.insert_element(empty, arguments[0], ir.Constant(i32, 0))
        zeros = ir.Constant(ir.VectorType(i32, row.width), [0] * row.width)
        return builder.shuffle_vector(first, empty, zeros)

    return row(value, width), codegen


def _operator(function, name: str) -> None:
    r"""Teaches Numba an arithmetic operator for rows of one type."""

    @infer_global(function)  # pyright: ignore[reportOptionalCall]
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], RowType) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(function, RowType, RowType)
    def lower(context, builder, signature, arguments):
        return getattr(builder, name)(*arguments)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _library(row: RowType, name: str, builder, returns, takes):
    suffix = f"v{row.width}f{row.dtype.bitwidth}"
    kind = ir.FunctionType(returns, takes)
    return builder.module.globals.get(f"llvm.{name}.{suffix}") or ir.Function(
        builder.module, kind, f"llvm.{name}.{suffix}"
    )


def _of_rows(name: str, count: int):
    r"""Makes the code generator of an LLVM function that acts number by number."""

    def codegen(context, builder, signature, arguments):
        vector = _vector(signature.args[0])
        function = _library(signature.args[0], name, builder, vector, [vector] * count)
        return builder.call(function, arguments)

    return codegen


@_intrinsic()
def floor(typing, row):
    r"""Rounds each number of a row down."""
    return row(row), _of_rows("floor", 1)


@_intrinsic()
def larger(typing, a, b):
    r"""Returns the larger of each two numbers, none of which is nan."""
    return (a(a, b), _of_rows("maxnum", 2)) if a == b else None


@_intrinsic()
def smaller(typing, a, b):
    r"""Returns the smaller of each two numbers, none of which is nan."""
    return (a(a, b), _of_rows("minnum", 2)) if a == b else None


@_intrinsic()
def multiply_add(typing, a, b, c):
    r"""Computes :math:`a b + c` number by number, with one rounding or with two."""
    return (a(a, b, c), _of_rows("fmuladd", 3)) if a == b == c else None


@_intrinsic()
def row_max(typing, row):
    r"""Returns the largest number of a row, none of which is nan."""

    def codegen(context, builder, signature, arguments):
        vector = _vector(row)
        function = _library(row, "vector.reduce.fmax", builder, vector.element, [vector])
        return builder.call(function, arguments, fastmath=["nnan", "nsz"])

    return row.dtype(row), codegen


@_intrinsic()
def row_sum(typing, row):
    r"""Returns the sum of a row, added in any order."""

    def codegen(context, builder, signature, arguments):
        vector = _vector(row)
        item = vector.element
        function = _library(row, "vector.reduce.fadd", builder, item, [item, vector])
        zero = ir.Constant(item, -0.0)
        return builder.call(function, [zero, arguments[0]], fastmath=["reassoc", "nsz"])

    return row.dtype(row), codegen


@_intrinsic()
def power_of_two(typing, x, bits):
    r"""Returns the power of two that brings a positive float64 into [2^(bits - 1), 2^bits)."""

    def codegen(context, builder, signature, arguments):
        i64 = ir.IntType(64)
        shift = ir.Constant(i64, 52)
        exponent = builder.lshr(builder.bitcast(arguments[0], i64), shift)  # biased by 1023
        factor = builder.sub(builder.add(arguments[1], ir.Constant(i64, 2045)), exponent)
        return builder.bitcast(builder.shl(factor, shift), ir.DoubleType())

    return types.float64(types.float64, types.int64), codegen


def add_products(C, c, S, s, si, sl, V, v, I, L, K, W):  # noqa: E741
    r"""Adds a matrix product, :math:`C_{ik} \mathrel{+}= \sum_l S_{il} V_{lk}` (compiled).

    Arguments:
        C: The sums, flat, with rows of `K` numbers from index `c`.
        c: The first index of the sums.
        S: The scalars, flat.
        s: The first index of the scalars.
        si: The distance between the scalars of neighbouring rows `i`.
        sl: The distance between the scalars of neighbouring terms `l`.
        V: The rows, flat, with `K` numbers each from index `v`.
        v: The first index of the rows.
        I: The number of rows of sums.
        L: The number of terms.
        K: The number of columns, a constant of the loop.
        W: The row width, a constant of the loop that divides `K`.
    """
    raise NotImplementedError("add_products works in functions that Numba compiles")


@overload(add_products, prefer_literal=True)
def _add_products(C, c, S, s, si, sl, V, v, I, L, K, W):  # noqa: E741
    K, W = K.literal_value, W.literal_value

    def loop(C, c, S, s, si, sl, V, v, I, L, K, W):  # noqa: E741
        for i in range(0, I - 3, 4):
            for k in range(0, K, W):
                o = c + i * K + k
                c0, c1 = load(C, o, W), load(C, o + K, W)
                c2, c3 = load(C, o + 2 * K, W), load(C, o + 3 * K, W)
                for j in range(L):
                    row = load(V, v + j * K + k, W)
                    q = s + i * si + j * sl
                    c0 = multiply_add(fill(peek(S, q), W), row, c0)
                    c1 = multiply_add(fill(peek(S, q + si), W), row, c1)
                    c2 = multiply_add(fill(peek(S, q + 2 * si), W), row, c2)
                    c3 = multiply_add(fill(peek(S, q + 3 * si), W), row, c3)
                store(C, o, c0)
                store(C, o + K, c1)
                store(C, o + 2 * K, c2)
                store(C, o + 3 * K, c3)
        for i in range(I - I % 4, I):
            for k in range(0, K, W):
                o = c + i * K + k
                c0 = load(C, o, W)
                for j in range(L):
                    row = load(V, v + j * K + k, W)
                    c0 = multiply_add(fill(peek(S, s + i * si + j * sl), W), row, c0)
                store(C, o, c0)

    return loop


def clear(target, o, count, W):
    r"""Sets `count` numbers from index `o` to zero, a multiple of `W`, in a compiled loop."""
    raise NotImplementedError("clear works in functions that Numba compiles")


@overload(clear, prefer_literal=True)
def _clear(target, o, count, W):
    W, zero = W.literal_value, 0.0 if target.dtype == types.float64 else np.float32(0.0)

    def loop(target, o, count, W):
        for k in range(o, o + count, W):
            store(target, k, fill(zero, W))

    return loop
