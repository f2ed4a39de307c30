"""Filters against references, guidance, seeds, likelihoods, and the distribution of samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from stage2_prior import Level, SamplingOptions, sample, sampling
from stage2_prior.sampling import (
    cumulative_sum,
    guide,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    per_seed_uniforms,
    sample_from_uniform,
    warp_logits,
)
from tests.helpers.compiling import traced
from tests.helpers.priors import any_order_prior, tiny_prior

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("k", [1, 3, 40, 99])
def test_top_k_equals_the_reference(k):
    torch.testing.assert_close(keep_top_k(LOGITS, k), TopKLogitsWarper(k)(None, LOGITS))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_equals_the_reference(p):
    torch.testing.assert_close(keep_top_p(LOGITS, p), TopPLogitsWarper(p)(None, LOGITS))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.0, 0.02, 0.3, 1.0])
def test_min_p_equals_the_reference(p):
    torch.testing.assert_close(keep_min_p(LOGITS, LOGITS, p), MinPLogitsWarper(p)(None, LOGITS))  # type: ignore[arg-type]


def test_temperature_zero_keeps_the_largest():
    assert (
        sample_from_uniform(warp_logits(LOGITS, 0, None, None), torch.full((5,), 0.99)).tolist()
        == LOGITS.argmax(1).tolist()
    )


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    drawn = [
        int(sample_from_uniform(logits, torch.tensor([u])))
        for u in (0.0, 0.19, 0.21, 0.69, 0.71, 0.999999)
    ]
    assert drawn == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("classes", [1, 11, 128, 129, 16384])
def test_sums_in_blocks_are_cumulative_sums(classes):
    values = torch.rand(2, 3, classes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cumulative_sum(values), values.cumsum(-1))
    assert torch.equal(cumulative_sum(values[..., :128]), values[..., :128].cumsum(-1)), (
        "one block is summed as it is"
    )


def test_cumulative_sums_are_short_enough_to_be_sequential(monkeypatch):
    """Compiled for a GPU, a scan of 16,384 numbers is split over processors, which torch 2.11
    cannot do."""
    cumsum, lengths = torch.Tensor.cumsum, []
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda x, dim: lengths.append(x.shape[dim]) or cumsum(x, dim)
    )
    sample_from_uniform(warp_logits(torch.randn(2, 16384), 1.0, None, 0.9), torch.rand(2))
    assert lengths and max(lengths) <= 128


def test_draw_never_returns_an_excluded_code():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    assert [
        int(sample_from_uniform(logits, torch.tensor([u]))) for u in (0.0, 0.5, 1 - 2**-24)
    ] == [1, 1, 1]


def test_draw_never_returns_an_excluded_code_where_sums_are_parallel(monkeypatch):
    """A scan in blocks, as on a GPU, is not flat where probabilities are 0: 16,384 codes, all but
    every 16th excluded."""

    def in_blocks(x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (-1, 64))
        within = blocks + 0.0
        for distance in (
            1,
            2,
            4,
            8,
            16,
            32,
        ):  # each block's sums by doubling, whose order of adding differs from place to place
            within[..., distance:] = within[..., distance:] + within[..., :-distance]
        before = blocks.sum(-1, keepdim=True).cumsum(-2) - blocks.sum(-1, keepdim=True)
        return (within + before).flatten(-2)

    logits = torch.randn(6, 16384, generator=torch.Generator().manual_seed(0))
    allowed = torch.arange(16384) % 16 == 3
    logits = logits.masked_fill(~allowed, float("-inf"))
    sums = in_blocks(logits.softmax(-1))
    rises = (sums.diff() > 0) & ~allowed[1:]
    assert rises.any(dim=1).all(), "the scan of this test must not be flat"
    monkeypatch.setattr(sampling, "cumulative_sum", in_blocks)
    for row, own, before in zip(logits, sums, rises, strict=True):
        # Numbers that the sum reaches only by a rise at an excluded code.
        uniform = (own[:-1][before] / own[-1]).clamp(0, 1 - 2**-24)
        drawn = sample_from_uniform(row.expand(len(uniform), -1), uniform)
        assert allowed[drawn].all()


def test_uniforms_depend_on_each_seed_alone():
    both = per_seed_uniforms([3, 4], 6)
    assert torch.equal(both[1], per_seed_uniforms([4], 6)[0]) and not torch.equal(both[0], both[1])


def log_probabilities(prior, text_ids, codes):
    """(B,N,K) of whole, uncached passes."""
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    with torch.no_grad():
        return prior(ids, torch.arange(ids.shape[1])).image


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0])
def test_guided_codes_equal_two_uncached_passes_combined(prior, text_ids, scale):
    seeds = [7, 8, 9]
    codes = sample(
        prior, text_ids, seeds, SamplingOptions(guidance_scale=scale, temperature=0.7, top_p=0.9)
    ).codes
    null = prior.stream.null_caption(3)
    logits = guide(
        log_probabilities(prior, text_ids, codes), log_probabilities(prior, null, codes), scale
    )
    noise = per_seed_uniforms(seeds, 9)
    for i in range(9):
        expected = sample_from_uniform(warp_logits(logits[:, i], 0.7, None, 0.9), noise[:, i])
        assert torch.equal(expected, codes[:, i])


def test_min_p_uses_probabilities_before_guidance(prior, text_ids):
    options = SamplingOptions(guidance_scale=30, min_p=0.6)
    codes = sample(prior, text_ids, [7, 8, 9], options).codes
    shares = log_probabilities(prior, text_ids, codes).softmax(-1)
    chosen = shares.gather(2, codes[..., None])[..., 0] / shares.amax(-1)
    assert chosen.min() >= 0.6 - 1e-5
    free = sample(prior, text_ids, [7, 8, 9], SamplingOptions(guidance_scale=30)).codes
    shares = log_probabilities(prior, text_ids, free).softmax(-1)
    assert (shares.gather(2, free[..., None])[..., 0] / shares.amax(-1)).min() < 0.6


def test_guidance_changes_the_samples(prior, text_ids):
    plain = sample(prior, text_ids, [1, 2, 3], SamplingOptions()).codes
    guided = sample(prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=4)).codes
    assert not torch.equal(plain, guided)


def test_unconditional_branch_is_skipped_without_guidance(prior, text_ids):
    sizes = []
    prior.blocks[0].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    sample(prior, text_ids, [1, 2, 3], SamplingOptions())
    assert sizes == [3] * 10
    sizes.clear()
    sample(prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=2))
    assert sizes == [4] + [6] * 9  # the null caption is read once for all


def test_cache_feeds_one_position_per_code(prior, text_ids):
    lengths = []
    prior.blocks[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    sample(prior, text_ids, [1, 2, 3], SamplingOptions())
    assert lengths == [5] + [1] * 9


def test_an_image_does_not_depend_on_its_batch(prior, text_ids):
    options = SamplingOptions(guidance_scale=2)
    together = sample(prior, text_ids, [5, 6, 7], options)
    for row, seed in enumerate((5, 6, 7)):
        alone = sample(prior, text_ids[row : row + 1], [seed], options)
        assert torch.equal(alone.codes[0], together.codes[row])
        torch.testing.assert_close(alone.log_likelihood[0], together.log_likelihood[row])


def test_log_likelihood_is_the_sum_over_codes_without_guidance_or_filters(prior, text_ids):
    drawn = sample(
        prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=3, temperature=0.5, top_k=4)
    )
    log_p = log_probabilities(prior, text_ids, drawn.codes).log_softmax(-1)
    torch.testing.assert_close(
        drawn.log_likelihood, log_p.gather(2, drawn.codes[..., None]).sum((1, 2))
    )


def test_levels_are_sampled_within_their_own_codes(text_ids):
    prior = tiny_prior((Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11)))
    codes = sample(prior, text_ids.repeat(20, 1), list(range(60)), SamplingOptions()).codes
    assert codes[:, 0].max() < 4 <= codes[:, 1:].max() < 11


def test_samples_follow_the_joint_distribution():
    """Chi-square over all 27 images of a prior with three codes of three kinds."""
    prior = tiny_prior((Level(grid=(1, 3), num_codes=3),))
    caption = torch.tensor([[1, 5, 6, 7, 2, 0]])
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_p = log_probabilities(prior, caption.repeat(27, 1), every).log_softmax(-1)
    expected = log_p.gather(2, every[..., None]).sum((1, 2)).exp() * 4000
    codes = sample(prior, caption.repeat(4000, 1), list(range(4000)), SamplingOptions()).codes
    counts = torch.bincount(codes @ torch.tensor([9, 3, 1]), minlength=27)
    # 26 degrees of freedom: the 99.9% quantile is 54.1.
    assert float(((counts - expected) ** 2 / expected).sum()) < 54.1


def test_guidance_is_refused_without_caption_dropout(prior, text_ids):
    prior.config.trained_with_caption_dropout = False
    with pytest.raises(ValueError, match="needs a prior trained with caption dropout"):
        sample(prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=2))
    assert len(sample(prior, text_ids, [1, 2, 3], SamplingOptions()).codes) == 3


def test_nonfinite_weights_stop_sampling(prior, text_ids):
    with torch.no_grad():
        prior.image_head.own.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        sample(prior, text_ids, [1, 2, 3], SamplingOptions())


@pytest.mark.parametrize("steps", [None, 4])
def test_step_of_the_first_nonfinite_logits_is_named(text_ids, steps):
    prior, passes = any_order_prior(), []

    def breaks(_, inputs, output):
        passes.append(0)
        # Captions are read, then steps 0, 1, 2
        return output * float("nan") if len(passes) == 4 else output

    prior.norm.register_forward_hook(breaks)
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        sample(prior, text_ids, [1, 2, 3], SamplingOptions(num_inference_steps=steps))


def test_bad_options_are_all_named():
    with pytest.raises(
        ValueError,
        match=r"sampling\.guidance_scale is -1.*sampling\.temperature is -2.*sampling\.top_k is 0.*"
        r"sampling\.top_p is 1\.5.*sampling\.min_p is 2",
    ):
        SamplingOptions(guidance_scale=-1, temperature=-2, top_k=0, top_p=1.5, min_p=2)


@pytest.mark.slow
@pytest.mark.parametrize(("captions", "as_sums"), [(1, True), (5, False)])
def test_compiled_sampling_draws_the_same_codes(prior, text_ids, monkeypatch, captions, as_sums):
    """With a backend that runs the traced graph as it is; one graph serves every slot of a batch
    size. Products of few rows are sums."""
    options = SamplingOptions(guidance_scale=2)
    text_ids, seeds = text_ids[[0, 1, 2, 0, 1][:captions]], range(captions)
    plain = sample(prior, text_ids, seeds, options)
    graphs = traced(monkeypatch)
    compiled = sample(prior, text_ids, seeds, options, compiled=True)
    assert len(graphs) == 2  # reading captions, and the step
    assert as_sums != any("linear" in str(node.target) for node in graphs[1].graph.nodes)
    assert torch.equal(compiled.codes, plain.codes)
    torch.testing.assert_close(compiled.log_likelihood, plain.log_likelihood)


def test_sampling_works_under_autocast(prior, text_ids):
    plain = sample(prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=2))
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample(prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=2))
    assert drawn.codes.shape == plain.codes.shape
    assert (drawn.codes == plain.codes).float().mean() > 0.5


@pytest.mark.parametrize("tiny", [{"temperature": 1e-40}, {"top_p": 1e-300}])
def test_numbers_that_fp32_cannot_tell_from_0_take_the_most_likely_code(prior, text_ids, tiny):
    options = SamplingOptions(**tiny)
    warped = warp_logits(LOGITS, options.temperature, None, options.top_p)
    drawn = sample_from_uniform(warped, torch.full((len(LOGITS),), 0.99))
    assert drawn.tolist() == LOGITS.argmax(-1).tolist()
    found = sample(prior, text_ids, range(3), options)
    expected = sample(prior, text_ids, range(3), SamplingOptions(temperature=0))
    assert torch.equal(found.codes, expected.codes)
