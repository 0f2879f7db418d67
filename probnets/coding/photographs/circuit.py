r"""The distribution of a number of a photograph as a conditional circuit."""

__all__ = ["PixelParameters", "pixel_circuit", "pixel_context", "stage_circuit"]

import math

import torch
from torch import Tensor, nn

from probnets.circuits import (
    ConditionalCircuit,
    DiscretisedLogistic,
    IntegerNetwork,
    IntegerParameters,
    ParameterNetwork,
    TreeCircuit,
    chain,
)
from probnets.circuits import Stage as CircuitStage

from .planes import Context
from .stages import Stage
from .tables import FINE, OCTAVE


class PixelParameters(nn.Module):
    r"""Creates the network of a stage: from a context to a mixture of logistics.

    Its layers give logits in octaves, means in spreads around the anchor and scales in octaves
    around the spread.

    Arguments:
        layers: The layers, from :math:`I` inputs to :math:`3 K` outputs, or the network of
            integers that they were rounded to.
        input_scale: What the inputs of layers are multiplied by, with shape :math:`(I,)`. A
            network of integers takes them as they are.
    """

    network: ParameterNetwork | IntegerParameters

    def __init__(
        self, layers: nn.Module | IntegerNetwork, input_scale: Tensor | float = 1.0
    ) -> None:
        super().__init__()
        if isinstance(layers, IntegerNetwork):
            self.network = IntegerParameters(layers)
        else:
            self.network = ParameterNetwork(layers, input_scale=input_scale)

    def forward(self, context: Tensor, earlier: Tensor) -> Tensor:
        r"""Computes logits, means and logarithms of scales, with shape :math:`(B, 3 K)`.

        Arguments:
            context: The contexts of :func:`pixel_context`, with shape :math:`(B, I + 2)`.
            earlier: The values of earlier stages, of which there are none.
        """
        inputs, anchor, spread = context[:, :-2], context[:, -2:-1], context[:, -1:]
        logit, mean, scale = self.network(inputs, earlier).chunk(3, dim=1)
        octaves = spread / OCTAVE - math.log2(FINE)  # of the spread, in levels
        scale = (octaves + scale).clamp(-6.0, 14.8)
        mean = anchor / FINE + torch.exp2(octaves) * mean
        return torch.cat([logit * math.log(2), mean, scale * math.log(2)], dim=1)


def pixel_circuit(parameters: nn.Module, components: int, values: int) -> ConditionalCircuit:
    r"""Makes the circuit of one number given its context: a sum over discretised logistics.

    Arguments:
        parameters: The network.
        components: The number of components :math:`K`.
        values: The number of values.

    Example:
        >>> network = PixelParameters(nn.Linear(5, 12), torch.ones(5))
        >>> circuit = pixel_circuit(network, components=4, values=256)
        >>> context = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 16 * 100.0, 64.0]])
        >>> circuit.log_prob(torch.tensor([[100]]), context).shape
        torch.Size([1])
    """
    template = TreeCircuit(chain(1), DiscretisedLogistic(1, components, values))
    return ConditionalCircuit([CircuitStage(template, parameters)])


def stage_circuit(stage: Stage, values: int = 256) -> ConditionalCircuit:
    r"""Makes the circuit that a stage of a model codes with, up to the rounding of intervals.

    Arguments:
        stage: The stage.
        values: The number of values.

    Example:
        >>> import numpy as np
        >>> from probnets.coding import pretrained
        >>> from probnets.coding.photographs.planes import colour_planes, contexts
        >>> stage = pretrained().stages[0]
        >>> colours = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
        >>> fit = pretrained().settings.fit("fast")
        >>> seen = contexts([stage.places], colour_planes(colours)[:1], top=255, fit=fit)[0]
        >>> x, context = pixel_context(seen)
        >>> stage_circuit(stage).log_prob(x, context).shape
        torch.Size([64])
    """
    return pixel_circuit(PixelParameters(stage.network), stage.components, values)


def pixel_context(context: Context) -> tuple[Tensor, Tensor]:
    r"""Returns numbers and contexts as tensors that a circuit takes.

    Arguments:
        context: The contexts of :func:`contexts`, :math:`N` of them.

    Returns:
        The numbers, less their least value, with shape :math:`(N, 1)`; and their contexts, the
        inputs of the network, the anchor and the spread, of float32 with shape
        :math:`(N, I + 2)`.
    """
    facts = torch.from_numpy(context.facts)
    value, anchor, spread, low = facts[:, :4].unbind(1)
    known = torch.stack([anchor - FINE * low, spread], dim=1).float()
    inputs = torch.from_numpy(context.inputs).float()
    return (value - low)[:, None], torch.cat([inputs, known], dim=1)
