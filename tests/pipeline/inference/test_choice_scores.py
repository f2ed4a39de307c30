"""The rule of `best_of` on a prior so small that all of its images can be enumerated: how often the
chosen image is right."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from pipeline.inference.reranking import choice_scores
from stage2_prior import (
    Level,
    PriorConfig,
    PriorModule,
    PriorObjective,
    PriorObjectiveConfig,
    StreamConfig,
    code_log_likelihood,
)

COLOURS = 4
SHAPES = 3
NEW = [(0, 1), (3, 2)]
"""(colour, shape) pairs without an example in training."""
SEEN = [pair for pair in product(range(COLOURS), range(SHAPES)) if pair not in NEW]
EVERY = torch.tensor(list(product(range(COLOURS), repeat=4)))
"""All 256 images of four codes."""


def caption(pair: tuple[int, int]) -> list[int]:
    """Start, colour, shape, end."""
    return [1, 4 + pair[0], 4 + COLOURS + pair[1], 2]


def image(pair: tuple[int, int]) -> list[int]:
    """Its codes: colour, shape, colour, shape."""
    return [*pair, *pair]


@pytest.fixture(scope="module")
def prior() -> PriorModule:
    """A prior that has learned the seen pairs in part."""
    torch.manual_seed(0)
    levels = (Level(grid=(2, 2), num_codes=COLOURS),)
    stream = StreamConfig(text_vocab_size=4 + COLOURS + SHAPES, text_length=4, levels=levels)
    prior = PriorModule(PriorConfig(width=32, depth=2, heads=2), stream)
    objective = PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0.2))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for step in range(150):
        pairs = [SEEN[i] for i in torch.randint(len(SEEN), (32,))]
        codes = torch.tensor([image(pair) for pair in pairs])
        noisy = torch.rand(codes.shape) < 0.1
        codes = torch.where(noisy, torch.randint(COLOURS, codes.shape), codes)
        text_ids = torch.tensor([caption(pair) for pair in pairs])
        (loss,) = objective.losses({"text_ids": text_ids, "codes": codes}, step)
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return prior.eval()


def likelihoods(prior: PriorModule, text_ids: list[int] | None) -> Tensor:
    """log p(codes | caption) of all images (256,); without a caption for None."""
    ids = prior.stream.null_caption(1) if text_ids is None else torch.tensor([text_ids])
    return code_log_likelihood(prior, ids.expand(len(EVERY), -1), EVERY).sum(1).double()


def right_of(count: int, given: Tensor, null: Tensor, right: int) -> float:
    """How often the chosen one of `count` images is number `right`, in 4,000 draws of the prior."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(given.exp(), 4000 * count, replacement=True, generator=generator)
    drawn = drawn.view(4000, count)
    chosen = choice_scores(given[drawn], null[drawn]).argmax(1, keepdim=True)
    return float((drawn.gather(1, chosen) == right).double().mean())


@pytest.mark.parametrize("pairs", [SEEN, NEW], ids=["seen", "new"])
def test_best_of_is_right_more_often_than_one_image(prior, pairs):
    null = likelihoods(prior, None)
    one = []
    best: dict[int, list[float]] = {2: [], 6: []}
    for pair in pairs:
        given = likelihoods(prior, caption(pair))
        assert given.exp().sum() == pytest.approx(1, abs=1e-4)
        right = EVERY.tolist().index(image(pair))
        one.append(float(given[right].exp()))
        for count, values in best.items():
            values.append(right_of(count, given, null, right))
    mean = [sum(values) / len(pairs) for values in (one, best[2], best[6])]
    assert mean[0] + 0.1 < mean[1] < mean[2]
    assert mean[2] > mean[0] + 0.2


def test_likelihood_ranks_before_pmi():
    """The likeliest image wins over one with more PMI; of three, the second of both may win."""
    given = torch.tensor([[-1.0, -2.0]])
    assert choice_scores(given, torch.tensor([[-1.0, -9.0]])).argmax() == 0
    given = torch.tensor([[-1.0, -2.0, -3.0]])
    null = torch.tensor([[-1.0, -5.0, -5.5]])  # a PMI of 0, 3 and 2.5
    assert choice_scores(given, null).argmax() == 1


def test_scores_of_one_prompt_do_not_depend_on_others():
    given = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    null = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    every = choice_scores(given, null)
    assert torch.equal(every[1:2], choice_scores(given[1:2], null[1:2]))


def test_equal_images_have_equal_scores():
    """Without a caption the PMI is 0 for all, but for rounding, and the likeliest image wins."""
    given = torch.tensor([[-5.0, -1.0, -5.0, -2.0, -3.0]])
    scores = choice_scores(given, given + 1e-6 * torch.arange(5))
    assert scores.argmax() == 1 and scores[0, 0] == scores[0, 2]
