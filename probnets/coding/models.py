r"""Models of images: integer tables with a shape, in a file."""

__all__ = [
    "AnyModel",
    "ImageModel",
    "Shipped",
    "as_model",
    "load_model",
    "pretrained",
    "shipped_model",
]

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, get_args, overload

import numpy as np
import torch

from probnets.backend.checkpoints import read, write
from probnets.circuits import Categorical, Tree, TreeCircuit

from .photographs.model import PhotographModel
from .tables import CodeTables
from .trees import TreeModel

FORMAT = 1

Shipped = Literal["photographs", "tree", "tiles"]


@dataclass(frozen=True, eq=False)
class ImageModel:
    r"""Creates a model of images from the integer tables of a circuit.

    A model of *whole* images codes the pixels of images of its very shape. A model of *tiles*
    codes images of any size and kind: their colours are rotated (YCoCg-R), their pixels
    predicted from neighbours (MED), and the residuals cut into tiles of the model's shape.
    Tiles at the border, and single planes such as grey, alpha or a mask, are coded by the same
    circuit with all else summed out.

    Arguments:
        tables: The integer tables of the circuit.
        shape: The shape of an image, or of a tile :math:`(h, w, 3)`.
        kind: What the circuit models.
    """

    tables: CodeTables
    shape: tuple[int, ...]
    kind: Literal["whole", "tiles"] = "whole"

    def __post_init__(self) -> None:
        D = self.tables.tree.variables
        whole = all(isinstance(n, int) and n >= 1 for n in self.shape)
        if not self.shape or not whole or math.prod(self.shape) != D:
            raise ValueError(f"expected a shape of {D} elements, got {self.shape}")
        if self.kind == "tiles" and not (
            len(self.shape) == 3 and self.shape[2] == 3 and self.tables.values == 512
        ):
            raise ValueError(
                "expected tiles with shape (h, w, 3) and 512 values, "
                f"got {self.shape} and {self.tables.values}"
            )
        if self.kind not in ("whole", "tiles"):
            raise ValueError(f"expected the kind 'whole' or 'tiles', got {self.kind!r}")

    @classmethod
    def from_circuit(
        cls, circuit: TreeCircuit, *, kind: Literal["whole", "tiles"] = "whole"
    ) -> "ImageModel":
        r"""Rounds a circuit to integers.

        Arguments:
            circuit: The circuit, whose shape is that of an image or of a tile.
            kind: What the circuit models.
        """
        return cls(CodeTables.from_circuit(circuit), tuple(circuit.shape), kind)

    @property
    def digest(self) -> bytes:
        r"""The first bytes of a hash of tables, shape and kind, by which streams name a model."""
        facts = f"{self.kind} {self.shape}".encode()
        return hashlib.sha256(self.tables.digest + facts).digest()[:4]

    def __repr__(self) -> str:
        return (
            f"ImageModel({self.digest.hex()}, kind={self.kind!r}, shape={self.shape}, "
            f"units={self.tables.units}, values={self.tables.values})"
        )

    def to_circuit(self) -> TreeCircuit:
        r"""Returns a circuit with the probabilities of the tables, to ask other things of."""
        tables = self.tables
        inputs = Categorical(tables.tree.inputs, tables.units, tables.values)
        circuit = TreeCircuit(tables.tree, inputs, shape=self.shape)
        with torch.no_grad():
            for logits, counts in (
                (circuit.root_logits, tables.root),
                (circuit.sum_logits, tables.sums),
                (inputs.logits, np.diff(tables.cumulative, axis=1)),
            ):
                logits.copy_(torch.from_numpy(counts.astype(np.float64)).log())
        return circuit

    def save(self, path: str | Path) -> None:
        r"""Writes the model to a safetensors file, whole or not at all.

        The file holds the integers that code, so that the model is the same on every machine.

        Arguments:
            path: The file.
        """
        tree, tables = self.tables.tree, self.tables
        arrays = {
            "parent": tree.parent,
            "region": tree.region,
            "sum_group": tree.sum_group,
            "input_group": tree.input_group,
            "root": tables.root,
            "sums": tables.sums,
            "cumulative": tables.cumulative,
        }
        arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
        facts = {"format": FORMAT, "what": "image model", "shape": self.shape, "kind": self.kind}
        write(path, arrays, facts)

    @classmethod
    def load(cls, path: str | Path) -> "ImageModel":
        r"""Reads a model from a file.

        Arguments:
            path: The file.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is not the file of a model.
        """
        arrays, facts = read(path)
        if not isinstance(facts, dict):
            raise ValueError(f"expected an image model in {path}, got {facts!r}")
        if facts.get("what") != "image model":
            raise ValueError(
                f"expected an image model in {path}, got {facts.get('what')!r}; read what "
                "save_circuit wrote by load_circuit"
            )
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"expected a model file of format {FORMAT}, got {facts.get('format')!r}; "
                "a newer probnets may read it"
            )
        try:
            parts = [arrays[name] for name in ("parent", "region", "sum_group", "input_group")]
            tree = Tree(*parts, origin=np.arange(parts[0].size))
            tables = CodeTables(tree, arrays["root"], arrays["sums"], arrays["cumulative"])
            return cls(tables, tuple(facts["shape"]), facts["kind"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"expected a sound model in {path}: {error}") from None


AnyModel = ImageModel | PhotographModel | TreeModel

_KINDS: dict[str | None, type[ImageModel] | type[PhotographModel] | type[TreeModel]] = {
    "photograph model": PhotographModel,
    "tree model": TreeModel,
}


def load_model(path: str | Path) -> AnyModel:
    r"""Reads a model of any kind from a file.

    Arguments:
        path: The file.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is not the file of a model.
    """
    _, facts = read(path)
    what = facts.get("what") if isinstance(facts, dict) else None
    return _KINDS.get(what, ImageModel).load(path)


def as_model(pc_model: AnyModel | TreeCircuit | str | Path | None) -> AnyModel:
    r"""Turns what a user may give into a model: one, a circuit, a file or nothing.

    Arguments:
        pc_model: The model. A circuit models whole images. Without any, the model of photographs
            that ships with the package.
    """
    if pc_model is None:
        return pretrained()
    if isinstance(pc_model, AnyModel):
        return pc_model
    if isinstance(pc_model, TreeCircuit):
        return ImageModel.from_circuit(pc_model)
    if isinstance(pc_model, (str, Path)):
        return load_model(pc_model)
    raise TypeError(
        "expected an image, photograph or tree model, a TreeCircuit, a path or None as pc_model, "
        f"got {type(pc_model).__name__}"
    )


def shipped_model(digest: bytes) -> AnyModel | None:
    r"""Returns the shipped model with a digest, if there is one.

    Arguments:
        digest: The digest, as a stream names its model.
    """
    models = (_shipped(name) for name in get_args(Shipped))
    return next((model for model in models if model.digest == digest), None)


@overload
def pretrained(name: Literal["photographs"] = "photographs") -> PhotographModel: ...
@overload
def pretrained(name: Literal["tree"]) -> TreeModel: ...
@overload
def pretrained(name: Literal["tiles"]) -> ImageModel: ...
def pretrained(name: Shipped = "photographs") -> AnyModel:
    r"""Loads a model that ships with the package.

    Arguments:
        name: The model: of photographs, the default; of trees as large as the image, whose
            marginals are tractable; or of tiles, the fastest.

    Raises:
        ValueError: If there is no such model.

    Example:
        >>> pretrained().kind, pretrained("tiles").kind
        ('photographs', 'tiles')
    """
    if name not in get_args(Shipped):
        names = ", ".join(map(repr, get_args(Shipped)))
        raise ValueError(f"expected one of the models {names}, got {name!r}")
    return _shipped(name)


@cache
def _shipped(name: Shipped) -> AnyModel:
    asset = resources.files("probnets") / "assets" / f"{name}.safetensors"
    with resources.as_file(asset) as path:
        return load_model(path)
