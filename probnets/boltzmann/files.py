r"""Files of image machines."""

__all__ = ["load_machine", "save_machine"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probnets.backend import checkpoints

from .couplings import Coupling, FreeCoupling, GramCoupling
from .images import ImageMachine
from .machine import BoltzmannMachine
from .tiers import Tier, TierCoupling

_WHAT = "Boltzmann machine"
_FORMAT = 1


def save_machine(path: str | Path, machine: ImageMachine) -> None:
    r"""Writes a machine to a safetensors file, with what is needed to build it again.

    Arguments:
        path: The file.
        machine: The machine, with a coupling of this library and without a field network.

    Raises:
        TypeError: If the machine has a field network or another coupling.
    """
    if machine.machine.field is not None:
        raise TypeError(
            f"expected a machine without a field network, got {_name(machine.machine.field)}; "
            "save its state_dict() and build the network again"
        )
    facts = {
        "what": _WHAT,
        "format": _FORMAT,
        "coupling": _describe(machine.machine.coupling),
        "shape": machine.shape,
        "levels": machine.levels,
        "classes": machine.classes,
        "learn_temperature": machine.log_temperatures is not None,
    }
    checkpoints.write(path, checkpoints.state_arrays(machine), facts)


def load_machine(path: str | Path, *, device: torch.device | str | None = None) -> ImageMachine:
    r"""Reads a machine that :func:`save_machine` wrote.

    Arguments:
        path: The file.
        device: The device.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the file of a machine.
    """
    arrays, facts = checkpoints.read_model(path, _WHAT, _FORMAT)
    try:
        bias = torch.from_numpy(arrays["machine.bias"])
        described = dict(facts["coupling"])
        coupling = _MAKERS[described.pop("kind")](described, bias.dtype)
        H, W = facts["shape"]
        machine = ImageMachine(
            BoltzmannMachine(coupling),
            shape=(H, W),
            levels=facts["levels"],
            classes=facts["classes"],
            learn_temperature=facts["learn_temperature"],
        )
        checkpoints.load_state(machine, arrays)
    except KeyError as error:
        raise ValueError(f"expected a machine in {path}: there is no {error}") from error
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected a machine in {path}: {error}") from error
    for name, tensor in machine.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"expected finite weights in {path}, got NaN or infinity in {name}")
    return machine.to(device)


def _describe(coupling: Coupling) -> dict[str, Any]:
    r"""Returns what is needed to build a coupling again, apart from its weights."""
    sizes = coupling.groups.sizes.tolist()
    # A subclass may compute anything, hence the types must be these very ones.
    if type(coupling) is GramCoupling:
        kind: dict[str, Any] = {"kind": "gram", "groups": sizes, "features": len(coupling.weight)}
    elif type(coupling) is FreeCoupling:
        kind = {"kind": "free", "groups": sizes}
    elif type(coupling) is TierCoupling:
        features = [tier.channels for tier in coupling.tiers]
        for i, j in coupling.kernels:
            features[i] = coupling.link(i, j).out_channels
        kind = {
            "kind": "tiers",
            "tiers": [list(tier) for tier in coupling.tiers],
            "links": [[i, j, k] for (i, j), k in coupling.kernels.items()],
            "features": features,
        }
    else:
        raise TypeError(
            "expected a GramCoupling, FreeCoupling or TierCoupling, got "
            f"{_name(coupling)}; save the state_dict() of the machine and build it again"
        )
    return {**kind, "cap": coupling.cap, "margin": coupling.margin}


def _gram(facts: dict[str, Any], dtype: torch.dtype) -> Coupling:
    return GramCoupling(**facts, dtype=dtype)


def _free(facts: dict[str, Any], dtype: torch.dtype) -> Coupling:
    return FreeCoupling(**facts, dtype=dtype)


def _tiers(facts: dict[str, Any], dtype: torch.dtype) -> Coupling:
    tiers = [Tier(*tier) for tier in facts.pop("tiers")]
    links = {(i, j): k for i, j, k in facts.pop("links")}
    return TierCoupling(tiers, links, **facts, dtype=dtype)


_MAKERS: dict[str, Callable[[dict[str, Any], torch.dtype], Coupling]] = {
    "free": _free,
    "gram": _gram,
    "tiers": _tiers,
}


def _name(module: object) -> str:
    return type(module).__name__
