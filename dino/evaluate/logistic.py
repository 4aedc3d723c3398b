"""Logistic regression of features that are read in blocks, for more of them than fit into memory as float32."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dino.evaluate.knn import Vectors
from dino.evaluate.statistics import Values
from dino.evaluate.task import Rows

ROWS_AT_ONCE = 1 << 12  # 16 MB of 1,024 features
# Those of scikit-learn's LogisticRegression:
GRADIENT_TOLERANCE, LOSS_TOLERANCE, LINE_SEARCHES = 1e-4, 64 * float(np.finfo(np.float64).eps), 50


class BlockedLogisticRegression:
    """The L2-regularised logistic regression of scikit-learn, of standardised vectors.

    Minimises, over weights ``W`` (K, D) and biases ``b`` (K,), ::

        1/n sum_i [ logsumexp(W z_i + b) - (W z_i + b)_{y_i} ] + ||W||^2 / (2 C n),    z_i = (x_i - mean) / scale

    by L-BFGS. K is the number of classes; with two of them the first has the logit 0, as in scikit-learn. Products are
    of float32, sums over blocks of float64.

    Args:
        vectors: ``(n, D)``; each evaluation of the loss reads all of them once.
        mean: ``(D,)``.
        scale: ``(D,)``.
        iterations: At most.

    Attributes:
        classes_: ``(C,)`` class numbers of the training rows, as in scikit-learn; after :meth:`fit`.
    """

    def __init__(self, vectors: Vectors, mean: Values, scale: Values, iterations: int) -> None:
        self.vectors, self.iterations = vectors, iterations
        self.mean, self.scale = torch.from_numpy(mean).float(), torch.from_numpy(scale).float()
        self.classes_: NDArray[np.int64] = np.empty(0, np.int64)
        self._parameters: Values | None = None  # (K * (D + 1),), of the last fit

    def fit(self, labels: Rows, strength: float) -> bool:
        """Fit, from the last result on.

        Args:
            labels: ``(n,)`` class numbers, the same in every call.
            strength: ``C`` of scikit-learn.

        Returns:
            Whether it converged.
        """
        from scipy.optimize import minimize

        self.classes_, places = np.unique(labels, return_inverse=True)
        truth = torch.from_numpy(places)
        outputs = len(self.classes_) if len(self.classes_) > 2 else 1
        start = self._parameters if self._parameters is not None else np.zeros(outputs * (self.vectors.shape[1] + 1))
        options = {"maxiter": self.iterations, "gtol": GRADIENT_TOLERANCE, "ftol": LOSS_TOLERANCE}
        found = minimize(
            lambda parameters: self._loss(parameters, truth, strength),
            start,
            method="L-BFGS-B",
            jac=True,
            options={**options, "maxls": LINE_SEARCHES},
        )
        self._parameters = found.x
        return bool(found.nit < self.iterations)

    def predict_proba(self, inputs: NDArray[np.float32]) -> Values:
        """Probabilities ``(m, C)`` of standardised vectors ``(m, D)``, as scikit-learn's."""
        assert self._parameters is not None, "call fit first"
        weights, bias = self._split(self._parameters, torch.device("cpu"))
        return _logits(torch.from_numpy(inputs), weights, bias).softmax(1).numpy()

    def _split(self, parameters: Values, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights ``(K, D)`` and biases ``(K,)``."""
        both = torch.from_numpy(parameters).view(-1, self.vectors.shape[1] + 1).to(device)
        return both[:, :-1], both[:, -1]

    def _loss(self, parameters: Values, truth: Tensor, strength: float) -> tuple[float, Values]:
        """The loss and its gradient."""
        total, gradient, count = 0.0, torch.zeros_like(torch.from_numpy(parameters)), len(self.vectors)
        of_weights, of_bias = self._split(gradient.numpy(), torch.device("cpu"))  # parts of its memory
        for start in range(0, count, ROWS_AT_ONCE):
            inputs = self.vectors[start : start + ROWS_AT_ONCE].float()
            inputs = (inputs - self.mean.to(inputs)).div_(self.scale.to(inputs))  # (n, D)
            weights, bias = self._split(parameters, inputs.device)
            logits = _logits(inputs, weights, bias)  # (n, C)
            labels = truth[start : start + ROWS_AT_ONCE].to(inputs.device)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            error = (logits.softmax(1) - F.one_hot(labels, logits.shape[1]))[:, -len(weights) :]  # (n, K)
            of_weights += (error.float().T @ inputs).double().cpu()
            of_bias += error.sum(0).cpu()
        weights = self._split(parameters, torch.device("cpu"))[0]
        penalty = 1 / (strength * count)
        of_weights.div_(count).add_(weights, alpha=penalty)
        of_bias.div_(count)
        return total / count + penalty / 2 * float(weights.square().sum()), gradient.numpy()


def _logits(inputs: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Logits ``(n, C)`` in float64; with one output, of two classes of which the first has 0."""
    logits = (inputs @ weights.to(inputs).T).double() + bias  # (n, K)
    return F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits
