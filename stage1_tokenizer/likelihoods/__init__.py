"""p(image given codes): negative log-likelihoods in nats, and the image to show. Know no networks;
one file per family."""

from __future__ import annotations

from stage1_tokenizer.likelihoods.base import Likelihood, bits_per_dimension
from stage1_tokenizer.likelihoods.bernoulli import Bernoulli
from stage1_tokenizer.likelihoods.gaussian import CalibratedGaussian, Gaussian, LearnedGaussian
from stage1_tokenizer.likelihoods.laplace import Laplace, LogitLaplace
from stage1_tokenizer.likelihoods.logistic import DiscretizedLogistic
from stage1_tokenizer.options import LikelihoodName


def build_likelihood(
    name: LikelihoodName, scale: float, channels: int = 3, mixtures: int = 1
) -> Likelihood:
    """The likelihood of a `TokenizerConfig`: `likelihood`, `likelihood_scale`, `channels` and
    `likelihood_mixtures`."""
    match name:
        case "l2":
            return Gaussian(scale)
        case "calibrated_l2":
            return CalibratedGaussian()
        case "learned_l2":
            return LearnedGaussian()
        case "l1":
            return Laplace(scale)
        case "logit_laplace":
            return LogitLaplace(scale)
        case "discretized_logistic":
            return DiscretizedLogistic(channels, mixtures)
        case "bernoulli":
            return Bernoulli()


__all__ = [
    "Bernoulli",
    "CalibratedGaussian",
    "DiscretizedLogistic",
    "Gaussian",
    "Laplace",
    "LearnedGaussian",
    "Likelihood",
    "LogitLaplace",
    "bits_per_dimension",
    "build_likelihood",
]
