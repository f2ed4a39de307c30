"""The evidence lower bound of one number under a mixture of two Gaussians, in two derivations.

    python -m examples.lectures.elbo --out elbo.png

log p(x) = ELBO + KL(q(z|x) || p(z|x)), so that the gap is a KL. And log p(x) is the logarithm of
the mean of p(x,z)/q(z|x) under q, and the ELBO the mean of the logarithm: a chord lies below the
curve (Jensen's inequality). Both gaps are the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.em import Mixture, bound, gap
from examples.lectures.plots import canvas, out_option

MIXTURE = Mixture(*torch.tensor([[0.6, 0.4], [-1.0, 1.5], [0.8, 1.0]], dtype=torch.float64))
X = torch.tensor([0.2], dtype=torch.float64)
CHOSEN = 0.85
"""The probability of z = 2 under the q of the right panel."""


def log_posterior(second: Tensor) -> Tensor:
    """log q(z|x) (N,2) by the probability (N,) of z = 2."""
    return torch.stack([1 - second, second], dim=1).log()


def ratios(log_q: Tensor) -> Tensor:
    """p(x,z) / q(z|x) (N,2): their mean under q is p(x), whatever q is."""
    return (MIXTURE.log_joint(X) - log_q).exp()


def main(out: Path) -> None:
    """The bound against q, and the chord of the logarithm for one q."""
    second = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    log_q = log_posterior(second)
    log_p = float(MIXTURE.log_likelihood(X))
    best = float(MIXTURE.log_posterior(X).exp()[0, 1])
    plot = canvas(11, 4)
    bounds, jensen = plot.subplots(1, 2)
    elbo = bound(MIXTURE, X, log_q)
    bounds.axhline(log_p, color="k", label="log p(x)")
    bounds.plot(second, elbo, "C0", label="ELBO")
    bounds.fill_between(
        second, elbo, elbo + gap(MIXTURE, X, log_q), alpha=0.2, label="KL(q(z|x) || p(z|x))"
    )
    bounds.axvline(best, color="k", linestyle=":", label="q(z|x) = p(z|x)")
    bounds.set(title="the gap is a KL", xlabel="q(z = 2 | x)", ylabel="nats")

    chosen = log_posterior(torch.tensor([CHOSEN], dtype=torch.float64))
    points = ratios(chosen)[0].sort().values
    p = float(MIXTURE.log_likelihood(X).exp())
    curve = torch.linspace(float(points[0]) * 0.6, float(points[1]) * 1.1, 300)
    at_q = float(bound(MIXTURE, X, chosen))
    jensen.plot(curve, curve.log(), "k", label="logarithm")
    jensen.plot(points, points.log(), "C0o-", label="between the ratios p(x,z)/q(z|x)")
    jensen.vlines(p, at_q, log_p, color="C3", linewidth=2, label="gap at their mean, p(x)")
    jensen.annotate("log p(x)", (p, log_p), (-55, 6), textcoords="offset points")
    jensen.annotate("ELBO", (p, at_q), (6, -12), textcoords="offset points")
    title = f"the mean of logarithms is below: q(z = 2 | x) = {CHOSEN}"
    jensen.set(title=title, xlabel="ratio", ylabel="nats")
    for axes in (bounds, jensen):
        axes.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
