r"""Circuits in files."""

__all__ = ["load_circuit", "save_circuit"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probnets.backend import checkpoints

from .circuit import TreeCircuit
from .inputs import Categorical, Discrete, Gaussian, Input
from .ordinal import Bernoulli, Binomial, DiscretisedLogistic
from .structure import Tree

FORMAT = "circuit"
VERSION = 1

_INPUTS: dict[str, type[Input]] = {
    kind.__name__: kind
    for kind in (Bernoulli, Binomial, Categorical, DiscretisedLogistic, Gaussian)
}
_TREE = ("parent", "region", "sum_group", "input_group", "origin")
_TYPES = (torch.float16, torch.float32, torch.float64)


def save_circuit(circuit: TreeCircuit, path: str | Path) -> None:
    r"""Writes a circuit to a safetensors file: tree, input distributions and parameters.

    The file is written whole or not at all. Parameters keep every bit, and are on the CPU when
    they are read again.

    Arguments:
        circuit: The circuit, whose inputs are one of the library's own classes.
        path: The file.

    Raises:
        TypeError: If the inputs are of another class, or the parameters of a type that such
            files do not hold.

    Example:
        >>> import tempfile
        >>> from probnets.circuits import chain
        >>> circuit = TreeCircuit(chain(3), Categorical(3, units=2, values=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "chain.safetensors")
        ...     save_circuit(circuit, path)
        ...     bool((load_circuit(path).sum_logits == circuit.sum_logits).all())
        True
    """
    inputs = circuit.inputs
    if _INPUTS.get(type(inputs).__name__) is not type(inputs):
        raise TypeError(
            f"expected inputs of one of {sorted(_INPUTS)}, got {type(inputs).__name__}; "
            "save the state_dict of your own"
        )
    state = circuit.state_dict()
    odd = {str(value.dtype) for value in state.values() if value.dtype not in _TYPES}
    if odd:
        raise TypeError(f"expected parameters in float16, 32 or 64, got {', '.join(sorted(odd))}")

    sizes = {"groups": inputs.groups, "units": inputs.units}
    if isinstance(inputs, Discrete):
        sizes["values"] = inputs.values
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": {"class": type(inputs).__name__, **sizes},
        "shape": list(circuit.shape),
    }
    if isinstance(inputs, Gaussian):
        facts["inputs"]["floor"] = inputs.floor
    arrays = {f"tree.{name}": getattr(circuit.tree, name) for name in _TREE}
    arrays |= {f"circuit.{name}": value.cpu().numpy() for name, value in state.items()}
    checkpoints.write(path, arrays, facts)


def load_circuit(path: str | Path) -> TreeCircuit:
    r"""Reads a circuit from a file. Nothing in the file is executed.

    Arguments:
        path: The file.

    Returns:
        The circuit, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of a circuit, is damaged, or is of a later version.
    """
    arrays, facts = checkpoints.read(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"expected a circuit in {path}, got a file of another kind")
    version = facts.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"expected a circuit of format version {VERSION} or less in {path}, got {version}; "
            "a later release of probnets wrote it"
        )
    try:
        return _circuit(arrays, facts)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"expected a consistent circuit in {path}: {reason}") from None


def _circuit(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> TreeCircuit:
    if facts["version"] != VERSION:
        raise ValueError(f"its format version is {facts['version']!r}")
    parts = checkpoints.part(arrays, "tree")
    tree = Tree(**{name: parts[name] for name in _TREE})
    if not np.array_equal(tree.sum_group, parts["sum_group"]):
        raise ValueError("its sum groups have gaps")
    if not np.array_equal(np.sort(tree.origin), np.arange(tree.regions)):
        raise ValueError("its regions do not come from one order")

    state = {
        name: torch.from_numpy(array.copy())
        for name, array in checkpoints.part(arrays, "circuit").items()
    }
    types = {value.dtype for value in state.values()}
    if len(types) != 1 or not types <= set(_TYPES):
        raise ValueError(f"its parameters are of the types {sorted(map(str, types))}")

    # Sizes are compared before anything of such a size is made.
    settings = dict(facts["inputs"])
    kind = _INPUTS[settings.pop("class")]
    groups, units = settings.pop("groups"), settings.pop("units")
    with torch.device("meta"):
        inputs = kind(groups, units, **settings)
    K, G = inputs.units, tree.sums
    expected = {f"inputs.{name}": value.shape for name, value in inputs.state_dict().items()}
    expected |= {"root_logits": torch.Size([K]), "sum_logits": torch.Size([G, K, K])}
    found = {name: value.shape for name, value in state.items()}
    if found != expected:
        raise ValueError(f"its parameters have shapes {_text(found)}, not {_text(expected)}")

    inputs.load_state_dict(
        {name.removeprefix("inputs."): v for name, v in state.items() if name[:7] == "inputs."},
        assign=True,
    )
    with torch.random.fork_rng(devices=[]):  # reading draws no numbers
        circuit = TreeCircuit(tree, inputs, shape=facts["shape"])
    circuit.load_state_dict(state)
    return circuit


def _text(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
