r"""Files of arrays and facts, written whole or not at all."""

__all__ = [
    "digest",
    "load_state",
    "part",
    "read",
    "read_model",
    "read_training",
    "replace",
    "state_arrays",
    "write",
    "write_training",
]

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

KEY = "probnets"


def write(path: str | Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    r"""Writes arrays and facts to a safetensors file.

    Arguments:
        path: The file.
        arrays: The arrays by name.
        facts: What JSON can hold.
    """
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    replace(path, save(whole, metadata={KEY: json.dumps(facts)}))


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    r"""Reads arrays and facts from a safetensors file. Nothing in it is executed.

    Arguments:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of arrays at {path}, got none")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = (file.metadata() or {}).get(KEY)
            if facts is None:
                raise ValueError("its header has no facts")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, json.loads(facts)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"expected a file that probnets wrote at {path}: {error}") from None


def read_model(
    path: str | Path, what: str, version: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    r"""Reads arrays and facts from the file of a kind of model.

    Arguments:
        path: The file.
        what: The kind, as its facts name it.
        version: The format that is understood.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the file of such a model.
    """
    arrays, facts = read(path)
    found = facts.get("what") if isinstance(facts, dict) else facts
    if not isinstance(facts, dict) or found != what:
        raise ValueError(f"expected a {what} in {path}, got {found!r}")
    if facts.get("format") != version:
        raise ValueError(
            f"expected a model file of format {version}, got {facts.get('format')!r}; "
            "a newer probnets may read it"
        )
    return arrays, facts


def state_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    r"""Copies the parameters and buffers of a module to arrays, each by its name.

    Arguments:
        module: The module.

    Raises:
        TypeError: If a parameter is of bfloat16, which NumPy does not know.

    Example:
        >>> {name: array.shape for name, array in state_arrays(nn.Linear(3, 2)).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    state = module.state_dict()
    if odd := {tensor.dtype for tensor in state.values()} & {torch.bfloat16}:
        raise TypeError(f"expected a type that NumPy knows, got {odd}; convert with .float()")
    return {name: tensor.cpu().numpy().copy() for name, tensor in state.items()}


def load_state(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    r"""Undoes :func:`state_arrays`, in place.

    Arguments:
        module: The module.
        arrays: The arrays of all its parameters and buffers. There may be others.

    Raises:
        ValueError: If one is missing, or has another shape or type.
    """
    state = module.state_dict()
    for name, tensor in state.items():
        array = arrays.get(name)
        given = None if array is None else torch.from_numpy(np.array(array))
        if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
            found = "none" if given is None else f"{given.dtype} {tuple(given.shape)}"
            raise ValueError(
                f"expected {name} of {tensor.dtype} {tuple(tensor.shape)}, got {found}"
            )
        state[name] = given
    module.load_state_dict(state)


def write_training(
    path: str | Path, module: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    r"""Writes a training under way: weights, the moments of the optimiser, and facts.

    Arguments:
        path: The file.
        module: The module that is trained.
        optimiser: Its optimiser, whose state is tensors.
        facts: What JSON can hold, with ``what`` and ``format``.
    """
    arrays = {f"model.{name}": array for name, array in state_arrays(module).items()}
    for number, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            arrays[f"adam.{number}.{name}"] = value.cpu().numpy()
    write(path, arrays, facts)


def read_training(
    path: str | Path, module: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any]
) -> dict[str, Any]:
    r"""Undoes :func:`write_training`, in place, and returns the facts of the file.

    Arguments:
        path: The file.
        module: The module.
        optimiser: Its optimiser.
        facts: What the training must share with the one of the file.

    Raises:
        ValueError: If it is the file of another training. Then nothing has changed.
    """
    arrays, found = read_model(path, facts["what"], facts["format"])
    for key, mine in facts.items():
        if found.get(key) != mine:
            raise ValueError(
                f"expected a checkpoint in {path} of the same {key}, {mine}, got "
                f"{found.get(key)}; continue with what it was begun with, or delete it"
            )
    weights = part(arrays, "model")
    if weights.keys() != module.state_dict().keys():
        raise ValueError(
            f"expected the weights of this model in {path}, got others; continue with what it "
            "was begun with, or delete it"
        )
    load_state(module, weights)
    state = optimiser.state_dict()
    for name, array in part(arrays, "adam").items():
        number, _, key = name.partition(".")
        state["state"].setdefault(int(number), {})[key] = torch.from_numpy(np.array(array))
    optimiser.load_state_dict(state)
    return found


def replace(path: str | Path, content: bytes) -> None:
    r"""Writes a file under another name and renames it, so that no reader meets a part of it.

    If the disk is full, a file that was there before remains as it was.

    Arguments:
        path: The file.
        content: Its content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def part(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    r"""Takes the arrays whose names begin with a prefix and a dot, without them."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def digest(*arrays: np.ndarray) -> str:
    r"""Hashes the shapes, types and contents of arrays, the same on every machine.

    Arguments:
        arrays: The arrays.

    Example:
        >>> digest(np.arange(3, dtype=np.int32))[:16]
        'ddb526d523fbac29'
    """
    state = hashlib.sha256()
    for array in arrays:
        little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        state.update(f"{little.dtype.str}{little.shape}".encode())
        state.update(little.tobytes())
    return state.hexdigest()
