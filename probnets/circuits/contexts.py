r"""Images as contexts."""

__all__ = ["ImageContext"]

import torch
from torch import Tensor, nn

from probnets.layers import Backbone, LatentRead

from .circuit import TreeCircuit
from .conditional import flatten_parameters, parameter_count


class ImageContext(nn.Module):
    r"""Creates the network of a stage whose context is an image.

    A backbone sees the image, and a linear map of its features gives the parameters of the
    circuit. The features are the mean over the image, or what some latent vectors read from it.
    At first the parameters are those of the template whatever the image shows, so that learning
    starts from a circuit that has been fitted without contexts.

    The network computes with floats: for likelihoods, samples and queries. Exact coding needs
    integers, which :class:`~probnets.circuits.ParameterNetwork` exports.

    References:
        | Conditional Sum-Product Networks: Imposing Structure on Deep Probabilistic
        | Architectures (Shao et al., 2020)
        | https://arxiv.org/abs/1905.08550

    Arguments:
        backbone: The backbone, of any layout.
        template: The circuit of the stage, with :math:`P` parameters.
        earlier: The number of values of earlier stages.
        reader: What reads the tokens of the image. By default their mean is taken.

    Example:
        >>> from probnets.circuits import Categorical, ConditionalCircuit, Stage, chain
        >>> template = TreeCircuit(chain(3), Categorical(3, units=2, values=4))
        >>> network = ImageContext(Backbone("C-T", in_channels=1, width=16), template)
        >>> circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
        >>> circuit.sample(torch.rand(7, 1, 28, 28)).shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        backbone: Backbone,
        template: TreeCircuit,
        *,
        earlier: int = 0,
        reader: LatentRead | None = None,
    ) -> None:
        super().__init__()
        like = backbone.input_mean
        features = backbone.out_channels
        if reader is not None:
            if reader.features != features:
                raise ValueError(
                    f"expected a reader of {features} features, got one of {reader.features}"
                )
            features = reader.latents * reader.out_features
        self.backbone, self.reader, self.earlier = backbone, reader, earlier
        self.head = nn.Linear(
            features + earlier, parameter_count(template), device=like.device, dtype=like.dtype
        )
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.copy_(flatten_parameters(template))

    def forward(self, context: Tensor, earlier: Tensor) -> Tensor:
        r"""Computes the parameters.

        Arguments:
            context: The images, with shape :math:`(B, C, H, W)`.
            earlier: The values of the earlier stages, with shape :math:`(B, D')`.

        Returns:
            The parameters, with shape :math:`(B, P)`.
        """
        if earlier.shape != (len(context), self.earlier):
            raise ValueError(
                f"expected earlier values with shape ({len(context)}, {self.earlier}), "
                f"got {tuple(earlier.shape)}"
            )
        if self.reader is None:
            features = self.backbone.features(context)
        else:
            features = self.reader(self.backbone.tokens(context)).flatten(1)
        return self.head(torch.cat([features, earlier.to(features.dtype)], dim=1))
