"""Attention-based multiple-instance learning: a slide is predicted from a weighted mean of its tiles.

The bag of a slide may be larger than the memory: it is read in pieces, and each is read again in the backward pass. The
gradients are those of the whole bag.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dino import randomness
from dino.config.schema import MilConfig
from dino.evaluate.outcomes import Outcome
from dino.evaluate.statistics import Values
from dino.evaluate.task import Rows

Piece = Callable[[], Tensor]
Dropout = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """No dropout."""
    return x


class Instances(Protocol):
    """Feature vectors of a slide, such as :class:`dino.data.bags.Bag`."""

    def __len__(self) -> int: ...

    def read(self, rows: slice | np.ndarray, /) -> np.ndarray:
        """Rows, a slice or indices, as finite float32 ``(n, D)``."""
        ...


class PiecewiseBag:
    """The instances of one case: those of its slides, one after the other.

    Args:
        slides: Instances of each slide.
        piece: Instances that are read at once.
    """

    def __init__(self, slides: Sequence[Instances], piece: int) -> None:
        self.slides, self.piece = slides, piece

    def __len__(self) -> int:
        return sum(len(slide) for slide in self.slides)

    def pieces(self, drawn: Rows | None = None) -> Iterator[Piece]:
        """Functions that read up to ``piece`` instances each, as ``(n, D)`` float32.

        Args:
            drawn: Indices of the instances, sorted; None for all.
        """
        first = 0
        for slide in self.slides:
            here = None if drawn is None else drawn[np.searchsorted(drawn, first) :] - first
            count = len(slide) if here is None else int(np.searchsorted(here, len(slide)))
            for start in range(0, count, self.piece):
                rows = slice(start, min(start + self.piece, count))
                yield partial(_read, slide, rows if here is None else here[rows])
            first += len(slide)


def _read(slide: Instances, rows: slice | np.ndarray) -> Tensor:
    return torch.from_numpy(slide.read(rows))


class Moments:
    """Mean and mean square of the instances of each case, for standardisation and mean pooling.

    Args:
        bags: The cases.
        advance: Called after each.

    Attributes:
        means: ``(M, D)`` float64.
        squares: ``(M, D)`` float64.
    """

    def __init__(self, bags: Sequence[PiecewiseBag], advance: Callable[[], None] = lambda: None) -> None:
        means, squares = [], []
        for bag in bags:
            sums = [(x.sum(0), x.square().sum(0)) for x in (read().double() for read in bag.pieces())]
            means.append(sum(total for total, _ in sums) / len(bag))
            squares.append(sum(total for _, total in sums) / len(bag))
            advance()
        self.means, self.squares = (torch.stack(values).numpy() for values in (means, squares))

    def of(self, rows: Rows) -> tuple[Values, Values]:
        """Mean and standard deviation ``(D,)`` of instances of ``rows``, in which every case has the same weight."""
        mean = self.means[rows].mean(0)
        return mean, _spread(self.squares[rows].mean(0) - mean**2, mean)


def _spread(variance: Values, mean: Values) -> Values:
    """Standard deviations to divide by: 1 for a feature that is constant but for rounding."""
    deviation = np.sqrt(variance.clip(0))
    return np.where(deviation > 1e-6 * (1e-6 + np.abs(mean)), deviation, 1.0)


class GatedAttention(nn.Module):
    """A network with gated attention over instances.

    With h_k = ReLU(E x_k) of the standardised instance x_k, the attention is a_k = softmax over k of
    w' (tanh(V h_k) * sigmoid(U h_k)) and the output a linear function of z = sum over k of a_k h_k (Ilse, Tomczak &
    Welling 2018, "Attention-based deep multiple instance learning", arXiv 1802.04712, eq. 7 and 9).

    Args:
        mean: ``(D,)`` subtracted from instances.
        deviation: ``(D,)`` that they are divided by.
        outputs: Number of outputs K.
        config: Widths.
        seed: Seed of the initial weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Values, deviation: Values, outputs: int, config: MilConfig, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("deviation", torch.from_numpy(deviation).float())
        generator = initial_weights(seed, "abmil weights")
        self.embed = linear(len(mean), config.hidden, generator)
        self.tanh = linear(config.hidden, config.attention, generator)
        self.gate = linear(config.hidden, config.attention, generator)
        self.score = linear(config.attention, 1, generator)
        self.head = linear(config.hidden, outputs, generator)

    def forward(self, pieces: Sequence[Piece], dropout: Dropout = unchanged) -> Tensor:
        """Outputs ``(K,)`` for one bag.

        Args:
            pieces: Functions that give its instances, each ``(n, D)``.
            dropout: Applied to the bag's vector z.
        """
        if len(pieces) == 1 or not torch.is_grad_enabled():
            pooled = [self._pool(piece) for piece in pieces]
        else:  # keep nothing of a piece but its pooled vector; compute it again in the backward pass
            pooled = [checkpoint(self._pool, p, use_reentrant=False, preserve_rng_state=False) for p in pieces]
        weights = torch.stack([total for total, _ in pooled]).softmax(0)  # (pieces,)
        bag = weights @ torch.stack([vector for _, vector in pooled])  # (hidden,)
        return self.head(dropout(bag))

    def embedded(self, instances: Tensor) -> Tensor:
        """Embedded instances ``(n, hidden)``."""
        return F.relu(self.embed((instances.to(self.mean) - self.mean) / self.deviation))

    def scores(self, embedded: Tensor) -> Tensor:
        """Attention ``(n,)`` before the softmax."""
        return self.score(self.tanh(embedded).tanh() * self.gate(embedded).sigmoid())[:, 0]

    def _pool(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Logarithm of the sum of exponentiated scores, and the weighted mean of the piece ``(hidden,)``."""
        embedded = self.embedded(piece())
        scores = self.scores(embedded)
        return scores.logsumexp(0), scores.softmax(0) @ embedded


def initial_weights(seed: int, purpose: str) -> torch.Generator:
    """A generator of initial weights."""
    return torch.Generator().manual_seed(int(randomness.generator(seed, 0, purpose).integers(1 << 62)))


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with Xavier's initial weights from ``generator``, and no bias."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # draws nothing from the global generator
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _drop(generator: np.random.Generator, rate: float, x: Tensor) -> Tensor:
    kept = generator.random(x.shape) >= rate
    return x * torch.from_numpy(kept / (1 - rate)).to(x)


class AttentionPooling:
    """A network of bags as a method of :func:`dino.evaluate.pooling.cross_validate`; candidates are numbers of epochs.

    The learning rate is constant, so that training for fewer epochs is the beginning of training for more, and one
    training gives the errors of all candidates.

    Args:
        outcome: What is predicted.
        bags: ``(M,)`` cases.
        moments: Of the bags.
        config: Settings.
        device: Where to train.
        seed: Seed of weights, order and dropout.
        network: Builds it of mean and deviation of instances, number of outputs, settings and seed.
    """

    def __init__(
        self,
        outcome: Outcome,
        bags: Sequence[PiecewiseBag],
        moments: Moments,
        config: MilConfig,
        device: torch.device,
        seed: int,
        network: Callable[..., GatedAttention] = GatedAttention,
    ) -> None:
        self.outcome, self.bags, self.moments, self.config = outcome, bags, moments, config
        self.device, self.seed, self.network = device, seed, network
        self.candidates: Sequence[Mapping[str, float]] = [{"epochs": epoch + 1} for epoch in range(config.epochs)]

    def errors(self, train: Rows, validation: Rows) -> Values:
        """Error of the validation rows after each epoch of training on others."""
        found = []
        for model, predict in self._epochs(train):
            found.append(self.outcome.error(self._predict(model, predict, validation), validation))
        return np.array(found)

    def predict(self, train: Rows, test: Rows, candidate: int) -> Values:
        """Predictions for the test rows after the number of epochs of a candidate."""
        for epoch, (model, predict) in enumerate(self._epochs(train)):
            if epoch == candidate:
                return self._predict(model, predict, test)
        raise IndexError(candidate)

    def _epochs(self, train: Rows) -> Iterator[tuple[GatedAttention, Callable[[Tensor], Values]]]:
        """The network after each epoch, and what makes predictions of its outputs."""
        config, head = self.config, self.outcome.head(train)
        model = self.network(*self.moments.of(train), head.outputs, config, self.seed).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
        for epoch in range(config.epochs):
            order = randomness.generator(self.seed, epoch, "abmil order").permutation(train)
            dropout = partial(_drop, randomness.generator(self.seed, epoch, "abmil dropout"), config.dropout)
            draws = randomness.generator(self.seed, epoch, "abmil instances")
            for start in range(0, len(order), config.batch_size):
                rows = order[start : start + config.batch_size]
                for row in rows:
                    outputs = model(list(self.bags[row].pieces(self._drawn(row, draws))), dropout)
                    (head.loss(outputs, int(row)) / len(rows)).backward()
                optimizer.step()
                optimizer.zero_grad()
            yield model, head.predict

    def _drawn(self, row: int, generator: np.random.Generator) -> Rows | None:
        """The instances of a case that a step sees; None for all."""
        count = len(self.bags[row])
        if self.config.tiles is None or count <= self.config.tiles:
            return None
        return np.sort(generator.choice(count, self.config.tiles, replace=False))

    @torch.no_grad()
    def _predict(self, model: GatedAttention, predict: Callable[[Tensor], Values], rows: Rows) -> Values:
        return predict(torch.stack([model(list(self.bags[row].pieces())) for row in rows]).cpu())
