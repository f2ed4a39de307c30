"""Both derivations of the bound give the same gap."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.elbo import MIXTURE, X, log_posterior, main, ratios
from examples.lectures.em import bound, gap


def posteriors() -> Tensor:
    return log_posterior(torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64))


def test_the_mean_ratio_is_the_likelihood_and_its_mean_logarithm_the_bound():
    log_q = posteriors()
    q = log_q.exp()
    likelihood = MIXTURE.log_likelihood(X).exp().expand(4)
    torch.testing.assert_close((q * ratios(log_q)).sum(1), likelihood)
    mean_logarithm = (q * ratios(log_q).log()).sum(1)
    torch.testing.assert_close(mean_logarithm, bound(MIXTURE, X, log_q))
    assert (mean_logarithm < likelihood.log()).all()


def test_bound_and_kl_sum_to_the_log_likelihood():
    log_q = posteriors()
    exact = MIXTURE.log_posterior(X).expand(4, 2)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_q), torch.distributions.Categorical(logits=exact)
    )
    torch.testing.assert_close(gap(MIXTURE, X, log_q), kl)
    total = bound(MIXTURE, X, log_q) + kl
    torch.testing.assert_close(total, MIXTURE.log_likelihood(X).expand(4))


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "elbo.png")
    assert (tmp_path / "elbo.png").read_bytes().startswith(b"\x89PNG")
