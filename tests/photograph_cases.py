r"""Tiny photographs, places to look at, and networks, for the compiled loop and the plain one."""

from typing import NamedTuple

import numpy as np

from probnets.coding import rangeloops
from probnets.coding.photographs import kernel, reference
from probnets.coding.photographs.kernel import (
    CONTEXT,
    DECODE,
    ENCODE,
    MARGIN,
    MEASURE,
    Buffers,
    Coder,
    Fit,
    Record,
    Taps,
)
from probnets.coding.photographs.network import OUTPUTS, Network
from probnets.coding.photographs.tables import tables
from probnets.coding.rangecoder import RangeDecoder, RangeEncoder

TABLES = tables()
FIT = Fit(64.0, 0.85, 2)

NEAR = [(0, -1), (-1, 0), (-1, 1), (-1, -1)]
AROUND = [(0, 0), (0, 1), (1, 0), (1, 1)]
FAR = [(y, x) for y in range(-MARGIN, 1) for x in range(-MARGIN, MARGIN + 1) if (y, x) < (0, 0)]
ALL = [(y, x) for y in range(-MARGIN, MARGIN + 1) for x in range(-MARGIN, MARGIN + 1)]


class Shape(NamedTuple):
    r"""Is a plane, its height and width, and the largest value of a channel."""

    plane: int
    height: int
    width: int
    top: int = 255


def taps_of(shape: Shape, own=NEAR, others=AROUND):
    r"""Returns places in a plane, and in those before it, as distances."""
    plane, height, width = shape.plane, shape.height, shape.width
    stride = width + 2 * MARGIN
    area = (height + 2 * MARGIN) * stride
    places = [y * stride + x for y, x in own]
    before = [y * stride + x - q * area for q in range(plane, 0, -1) for y, x in others]
    regressors = [(place, -1, -stride) for place in places]
    regressors += [(place, -(plane - q) * area, -1) for q in range(plane) for place in before[:5]]
    return Taps(
        np.array(regressors, np.int64).reshape(-1, 3),
        np.array(places[:8] + before, np.int64),
        np.array(places, np.int64),
    )


def network_of(taps, *, seed=0, units=32, size=40, scales=(2.0**-7, 2.0**-7), rate=0.0):
    r"""Draws a network of whole numbers up to a size, which adapts if there is a rate."""
    inputs = 1 + 2 * taps.errors.size + taps.pixels.size
    random = np.random.default_rng(seed)

    def whole(*shape):
        return random.integers(-size, size + 1, shape).astype(np.float32)

    def scale(number, around):
        return np.float32(around) * random.choice([0.5, 1.0, 2.0], number).astype(np.float32)

    def some(number, most):
        return random.uniform(most / 2, most, number).astype(np.float32)

    second = whole(units, OUTPUTS)
    return Network(
        first=whole(inputs, units).ravel(),
        first_bias=whole(units),
        first_scale=scale(units, scales[0]),
        second=second.ravel(),
        second_bias=whole(OUTPUTS),
        second_scale=scale(OUTPUTS, scales[1]),
        turned=second.T.ravel(),  # a copy
        rates=some(inputs + 1 if rate else 0, rate * 1e-2),
        lift=some(units, 1.0),
        back=some(OUTPUTS, 0.1),
        ahead=some(OUTPUTS, rate * 0.1),
        second_rates=some(OUTPUTS, 64.0),
    )


def image_of(kind, shape: Shape):
    r"""Returns a picture with shape `(H, W, 3)`."""
    _, height, width, top = shape
    y, x = np.mgrid[:height, :width]
    random = np.random.default_rng(height * width)
    match kind:
        case "constant":
            channels = [np.full_like(y, (top * k) // 3) for k in range(3)]
        case "noise":
            channels = list(random.integers(0, top + 1, (3, height, width)))
        case "gradient":
            channels = [(top * (k * y + x)) // (3 * height + width) for k in range(3)]
        case "board":
            channels = [top * ((x + y + (k == 1)) % 2) for k in range(3)]
        case _:  # smooth, with some noise
            wave = top / 2 + top / 3 * np.sin(x / 3 + y / 5)
            noise = random.normal(0, top / 50, (3, height, width))
            channels = [np.clip(wave + n, 0, top).round().astype(int) for n in noise]
    return np.stack(channels, axis=-1)


def buffers_of(image):
    r"""Returns the planes of a picture, with nothing in their margins."""
    a = image.astype(np.int32)
    planes = np.stack([a[..., 1], a[..., 0] - a[..., 1], a[..., 2] - a[..., 1]])
    planes = np.pad(planes, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))).ravel()
    return Buffers(planes, np.zeros_like(planes), np.zeros_like(planes))


def copy_of(arrays):
    return type(arrays)(*(array.copy() for array in arrays))


class Result(NamedTuple):
    r"""Is all that a run changes or returns."""

    stream: bytes
    sound: bool
    strays: int
    buffers: Buffers
    net: Network
    record: Record


def _record(action, shape, taps):
    r"""Makes room for the records of an action."""
    pixels = shape.height * shape.width
    inputs = 1 + 2 * taps.errors.size + taps.pixels.size
    shown = pixels if action == CONTEXT else 1
    return Record(
        np.zeros(pixels if action == MEASURE else 1, np.float32),
        np.zeros((shown, inputs), np.int16),
        np.zeros((shown, 5), np.int32),
    )


def run_compiled(action, shape: Shape, buffers, taps, net, *, fit=FIT, components=4, data=b""):
    r"""Runs the compiled loop on copies."""
    buffers, net, record = copy_of(buffers), copy_of(net), _record(action, shape, taps)
    state = rangeloops.coder_states(1)
    source = np.array(list(data) or [0], np.uint8)
    pixels = shape.height * shape.width
    out = np.zeros((1, rangeloops.stream_capacity(pixels)), np.uint8)
    if action == DECODE:
        rangeloops.start_decoding_one(state, source, 0, 0, len(data))
    else:
        rangeloops.start_encoding_one(state, 0)
    coder = Coder(state, source, out)
    rest = (components, buffers, taps, fit, net, TABLES, coder, record)
    strays = kernel.run_plane(action, *shape, *rest)

    stream, sound = b"", True
    if action == ENCODE:
        stream = out[0, : rangeloops.finish_one(state, out, 0)].tobytes()
    elif action == DECODE:
        sound = bool(rangeloops.canonical_one(state, 0))
    return Result(stream, sound, strays, buffers, net, record)


def run_plain(action, shape: Shape, buffers, taps, net, *, fit=FIT, components=4, data=b""):
    r"""Runs the plain loop on copies."""
    buffers, net, record = copy_of(buffers), copy_of(net), _record(action, shape, taps)
    encoder, decoder = RangeEncoder(), RangeDecoder(data)
    coder = decoder if action == DECODE else encoder
    rest = (components, buffers, taps, fit, net, TABLES, coder, record)
    strays = reference.run_plane(action, *shape, *rest)

    stream = encoder.finish() if action == ENCODE else b""
    sound = decoder.canonical() if action == DECODE else True
    return Result(stream, sound, strays, buffers, net, record)
