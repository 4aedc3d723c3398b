"""Terms that spread the features of different samples over the sphere: KoLeo and KDE.

Both compare samples within groups of consecutive draws, view by view. So they do not depend on how the global batch is
split over processes and micro-batches, and need no exchange between processes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dino.crops.parameters import GLOBAL_VIEWS
from dino.errors import ConfigError
from dino.objectives import Objective, Outputs, Terms

# Unit vectors nearer than this are taken for the same image twice, and are no neighbours. The distance is computed from
# a cosine in fp32, which cannot resolve less.
DUPLICATE = 1e-3
EPSILON = 1e-8


class Spread(Objective):
    """Base of the terms on the student's cls tokens of the global views.

    Args:
        weight: Factor of the loss.
        group_size: Number of consecutive draws that are compared with each other.
        batch_size: Samples of a micro-batch.

    Raises:
        ConfigError: If the batch cannot be split into groups.
    """

    across_samples = True
    reads_teacher = False

    def __init__(self, weight: float, group_size: int, batch_size: int) -> None:
        super().__init__(weight)
        if group_size < 2:
            raise ConfigError(f"expected objective.spread_group of at least 2, found {group_size}")
        if batch_size % group_size:
            nearest = max(1, round(batch_size / group_size)) * group_size
            raise ConfigError(
                f"objective.{self.name} compares groups of objective.spread_group={group_size} samples: expected "
                f"training.batch_size_per_gpu to be a multiple of it, found {batch_size}; the nearest is {nearest}"
            )
        self.group_size = group_size

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """The loss of a micro-batch: the mean over groups, views and samples."""
        cls = student.tokens[0].cls[:GLOBAL_VIEWS]  # (G, B, D)
        groups = cls.unflatten(1, (-1, self.group_size)).flatten(0, 1)  # (G B / g, g, D)
        with torch.autocast(cls.device.type, enabled=False):  # bf16 could not tell near vectors apart
            groups = groups.to(torch.promote_types(groups.dtype, torch.float32))
            return Terms({self.name: self.loss(F.normalize(groups, dim=-1, eps=EPSILON))}, {})

    def loss(self, groups: Tensor) -> Tensor:
        """The loss of (groups, g, D) unit vectors, a scalar."""
        raise NotImplementedError


class KoLeo(Spread):
    """Kozachenko-Leonenko entropy estimator (Sablayrolles et al. 2018, arXiv 1806.03198; DINOv2, arXiv 2304.07193)."""

    name = "koleo"

    def loss(self, groups: Tensor) -> Tensor:
        """See :func:`koleo`."""
        return koleo(groups)


class KDE(Spread):
    """Kernel density estimator on the sphere, as in Midnight (Karasikov et al. 2025, arXiv 2504.05186).

    Args:
        weight: Factor of the loss.
        concentration: Concentration c of the kernel.
        group_size: Number of consecutive draws that are compared with each other.
        batch_size: Samples of a micro-batch.
    """

    name = "kde"

    def __init__(self, weight: float, concentration: float, group_size: int, batch_size: int) -> None:
        super().__init__(weight, group_size, batch_size)
        self.concentration = concentration

    def loss(self, groups: Tensor) -> Tensor:
        """See :func:`kde`."""
        return kde(groups, self.concentration)


def koleo(groups: Tensor) -> Tensor:
    """Mean of the negative logarithm of the distance to the nearest other vector of the group.

    ::

        L = -1/N sum_i log(min_{j != i} |x_i - x_j| + 1e-8)

    Vectors nearer than 1e-3 are not neighbours: between two copies of one image the gradient would have no bound.

    Args:
        groups: (groups, g, D) unit vectors.

    Returns:
        The loss, a scalar. A vector without a neighbour counts 0.
    """
    with torch.no_grad():
        cosines = groups @ groups.transpose(1, 2)  # (groups, g, g)
        cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        cosines.masked_fill_(cosines > 1 - DUPLICATE**2 / 2, -torch.inf)  # |x - y|^2 = 2 - 2 x.y
        best, nearest = cosines.max(-1)  # (groups, g)
    neighbours = groups.gather(1, nearest[..., None].expand_as(groups))
    distances = torch.linalg.vector_norm(groups - neighbours, dim=-1)
    has_neighbour = torch.isfinite(best)
    return -torch.where(has_neighbour, (torch.where(has_neighbour, distances, 1.0) + EPSILON).log(), 0.0).mean()


def kde(groups: Tensor, concentration: float) -> Tensor:
    """Mean logarithm of the kernel density at each vector (Wang & Isola 2020, arXiv 2005.10242, in another form).

    ::

        L = 1/N sum_i log( 1/(g - 1) sum_{j != i} exp(c x_i . x_j) )

    It is minimized where the vectors are spread uniformly.

    Args:
        groups: (groups, g, D) unit vectors.
        concentration: Concentration c of the kernel.

    Returns:
        The loss, a scalar.
    """
    count = groups.shape[1]
    cosines = groups @ groups.transpose(1, 2)  # (groups, g, g)
    others = ~torch.eye(count, dtype=torch.bool, device=groups.device)
    exponents = (concentration * cosines).masked_fill(~others, -torch.inf)
    return (exponents.logsumexp(-1) - math.log(count - 1)).mean()
