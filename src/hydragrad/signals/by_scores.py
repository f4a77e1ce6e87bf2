"""Signals from scores: whom an example harms, and which examples contribute alike."""

from typing import Any

import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.shapes import Float, Int


def harm(scores: Float[Tensor, "N M"]) -> Float[Tensor, " N"]:
    """Minus the mean score: by how much the mean query would improve without the example."""
    return -scores.mean(1)


def harm_to_own_class(scores: Float[Tensor, "N C"], given: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Minus the score for the queries of the example's own label; ``scores``: one column a class."""
    return -scores.gather(1, given[:, None])[:, 0]


def cluster_harm(scores: Float[Tensor, "N M"], clusters: int = 10, seed: int = 0) -> Float[Tensor, " N"]:
    """HYDRA's clustering: contribution vectors in k-means clusters; first the most harmful cluster, within it by harm.

    Rows are scaled to unit length, so that clusters are of directions (whom it helps and harms), not of sizes.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UnsupportedError(
            message("clustering needs scikit-learn, which is not installed", remedy="pip install 'hydragrad[data]'")
        ) from error
    unit = scores.double() / scores.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    clusters = min(clusters, len(unit.round(decimals=9).unique(dim=0)))  # fewer directions have no more clusters
    means: Any = KMeans(clusters, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    found = torch.as_tensor(means.fit_predict(unit.numpy())).long()
    own = harm(scores.double())
    harms = torch.stack([own[found == k].mean() for k in range(clusters)])
    spread = float(own.max() - own.min()) or 1.0
    order = harms.argsort().argsort()[found]  # places of the clusters: 0, 1, ...
    return (order + 0.999 * (own - own.min()) / spread).to(scores.dtype)
