r"""Running the compiled loop over the planes of a part of a photograph."""

__all__ = [
    "Context",
    "colour_planes",
    "contexts",
    "decode_planes",
    "encode_planes",
    "measure_planes",
    "plane_colours",
    "residuals",
    "restore",
]

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from probnets.coding.errors import unsound_stream
from probnets.coding.rangeloops import (
    canonical_one,
    coder_states,
    finish_one,
    start_decoding_one,
    start_encoding_one,
    stream_capacity,
)

from .kernel import (
    CONTEXT,
    DECODE,
    ENCODE,
    MARGIN,
    MEASURE,
    RESTORE,
    Buffers,
    Coder,
    Fit,
    Record,
    run_plane,
)
from .model import Mode, PhotographModel
from .network import OUTPUTS, UNITS, Network
from .stages import Places
from .tables import tables

_NO_CODER = Coder(coder_states(1), np.zeros(1, np.uint8), np.zeros((1, 1), np.uint8))
_NO_RECORD = Record(
    np.zeros(1, np.float32), np.zeros((1, 1), np.int16), np.zeros((1, 5), np.int32)
)


def colour_planes(colours: np.ndarray) -> np.ndarray:
    r"""Returns green, red less green and blue less green.

    Arguments:
        colours: Red, green and blue, unsigned integers with shape :math:`(H, W, 3)`.

    Returns:
        The planes, int32 with shape :math:`(3, H, W)`.
    """
    red, green, blue = np.moveaxis(colours.astype(np.int32), 2, 0)
    return np.stack([green, red - green, blue - green])


def plane_colours(planes: np.ndarray) -> np.ndarray:
    r"""Returns red, green and blue, the inverse of :func:`colour_planes`.

    Arguments:
        planes: The planes, integers with shape :math:`(3, H, W)`.

    Returns:
        The colours, integers with shape :math:`(H, W, 3)`.
    """
    green, red, blue = planes
    return np.stack([red + green, green, blue + green], axis=2)


def encode_planes(
    model: PhotographModel, planes: np.ndarray, *, top: int, mode: Mode = "fast"
) -> bytes:
    r"""Encodes planes into a stream.

    Arguments:
        model: The model.
        planes: One plane of values from 0 to `top`, or three: green, red less green and blue
            less green. Integers with shape :math:`(P, H, W)`.
        top: The largest value of a channel.
        mode: The mode.
    """
    state, out = coder_states(1), np.empty((1, stream_capacity(planes.size)), np.uint8)
    start_encoding_one(state, 0)
    coder = _NO_CODER._replace(state=state, out=out)
    buffers = _filled(planes)
    for plane in range(len(planes)):
        _run(ENCODE, model, plane, planes.shape, top, mode, buffers, coder=coder)
    return out[0, : finish_one(state, out, 0)].tobytes()


def decode_planes(
    model: PhotographModel,
    stream: bytes,
    shape: tuple[int, int, int],
    *,
    top: int,
    mode: Mode = "fast",
) -> np.ndarray:
    r"""Decodes the planes of a stream.

    Arguments:
        model: The model.
        stream: The stream.
        shape: The shape of the planes, :math:`(P, H, W)`.
        top: The largest value of a channel.
        mode: The mode.

    Returns:
        The planes, int32 with that shape.

    Raises:
        StreamError: If it is not a stream that the encoder wrote.
    """
    state, data = coder_states(1), np.frombuffer(bytearray(stream) or bytearray(1), np.uint8)
    start_decoding_one(state, data, 0, 0, len(stream))
    coder = _NO_CODER._replace(state=state, data=data)
    buffers = _empty(shape)
    for plane in range(shape[0]):
        _run(DECODE, model, plane, shape, top, mode, buffers, coder=coder)
    if not canonical_one(state, 0):
        raise unsound_stream()
    return _inner(buffers.planes, shape)


def measure_planes(
    model: PhotographModel, planes: np.ndarray, *, top: int, mode: Mode = "fast"
) -> np.ndarray:
    r"""Computes how many bits each number takes, float32 with the shape of the planes.

    Arguments:
        model: The model.
        planes: The planes, as in :func:`encode_planes`.
        top: The largest value of a channel.
        mode: The mode.
    """
    buffers, bits = _filled(planes), np.empty(planes.shape, np.float32)
    for plane in range(len(planes)):
        record = _NO_RECORD._replace(bits=bits[plane].reshape(-1))
        _run(MEASURE, model, plane, planes.shape, top, mode, buffers, record=record)
    return bits


class Context(NamedTuple):
    r"""Is what is known of each number of a plane before it is coded, a line for each.

    ``inputs`` are those of the network, int16 with shape :math:`(N, I)`. ``facts`` are the
    number itself, its anchor in sixteenths, the logarithm of the spread nearby, and the least
    and the last value it can have, int32 with shape :math:`(N, 5)`.
    """

    inputs: np.ndarray
    facts: np.ndarray


def contexts(places: Sequence[Places], planes: np.ndarray, *, top: int, fit: Fit) -> list[Context]:
    r"""Finds the context of each number, for training.

    Arguments:
        places: What is looked at, for each plane.
        planes: The planes, as in :func:`encode_planes`.
        top: The largest value of a channel.
        fit: The settings of least squares.
    """
    _, height, width = planes.shape
    buffers, found = _filled(planes), []
    for here in places[: len(planes)]:
        context = Context(
            np.empty((height * width, here.inputs), np.int16),
            np.empty((height * width, 5), np.int32),
        )
        record = _NO_RECORD._replace(inputs=context.inputs, facts=context.facts)
        _predict(CONTEXT, here, planes.shape, top, fit, buffers, record)
        found.append(context)
    return found


def residuals(places: Sequence[Places], planes: np.ndarray, *, top: int, fit: Fit) -> np.ndarray:
    r"""Subtracts the rounded anchors from planes.

    Arguments:
        places: What is looked at, for each plane.
        planes: The planes, as in :func:`encode_planes`.
        top: The largest value of a channel.
        fit: The settings of least squares.

    Returns:
        The residuals, from `-top` to `top`, int32 with the shape of the planes.
    """
    found = contexts(places, planes, top=top, fit=fit)
    rest = [context.facts[:, 0] - ((context.facts[:, 1] + 8) >> 4) for context in found]
    return np.stack(rest).reshape(planes.shape)


def restore(places: Sequence[Places], rest: np.ndarray, *, top: int, fit: Fit) -> np.ndarray:
    r"""Adds the rounded anchors to residuals, the inverse of :func:`residuals`.

    Arguments:
        places: What is looked at, for each plane.
        rest: The residuals, integers with shape :math:`(P, H, W)`.
        top: The largest value of a channel.
        fit: The settings of least squares.

    Returns:
        The planes, int32 with the same shape.

    Raises:
        StreamError: If these are not the residuals of planes.
    """
    buffers, strays = _filled(rest), 0
    for here in places[: len(rest)]:
        strays += _predict(RESTORE, here, rest.shape, top, fit, buffers, _NO_RECORD)
    if strays:
        raise unsound_stream()
    return _inner(buffers.planes, rest.shape)


def _run(
    action: int,
    model: PhotographModel,
    plane: int,
    shape: tuple[int, ...],
    top: int,
    mode: Mode,
    buffers: Buffers,
    *,
    coder: Coder = _NO_CODER,
    record: Record = _NO_RECORD,
) -> None:
    stage = model.stages[plane]
    run_plane(
        action,
        plane,
        shape[1],
        shape[2],
        top,
        model.components,
        buffers,
        stage.places.taps(shape[1], shape[2]),
        model.settings.fit(mode),
        stage.compiled(model.settings.adaptation(mode)),
        tables(),
        coder,
        record,
    )


def _predict(
    action: int,
    places: Places,
    shape: tuple[int, ...],
    top: int,
    fit: Fit,
    buffers: Buffers,
    record: Record,
) -> int:
    r"""Runs the part of the loop that needs no network."""
    taps = places.taps(shape[1], shape[2])
    none = np.zeros(0, np.float32)
    net = Network(*[none] * len(Network._fields))._replace(
        first_bias=np.zeros(UNITS, np.float32), second_bias=np.zeros(OUTPUTS, np.float32)
    )
    return run_plane(
        action,
        places.plane,
        shape[1],
        shape[2],
        top,
        1,
        buffers,
        taps,
        fit,
        net,
        tables(),
        _NO_CODER,
        record,
    )


def _filled(planes: np.ndarray) -> Buffers:
    r"""Makes the buffers of planes that are known."""
    buffers = _empty(planes.shape)
    P, H, W = planes.shape
    padded = buffers.planes.reshape(P, H + 2 * MARGIN, W + 2 * MARGIN)
    padded[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = planes
    return buffers


def _empty(shape: tuple[int, ...]) -> Buffers:
    P, H, W = shape
    size = P * (H + 2 * MARGIN) * (W + 2 * MARGIN)
    return Buffers(*(np.zeros(size, np.int32) for _ in Buffers._fields))


def _inner(planes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    r"""Takes the margins off."""
    P, H, W = shape
    padded = planes.reshape(P, H + 2 * MARGIN, W + 2 * MARGIN)
    return np.ascontiguousarray(padded[:, MARGIN:-MARGIN, MARGIN:-MARGIN])
