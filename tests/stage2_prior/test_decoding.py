"""The sampling loop: any order, several codes per step, known codes, and the number of forward
passes."""

from __future__ import annotations

import itertools
import math
import os
import shutil

import pytest
import torch

from stage2_prior import Level, SamplingOptions, code_log_likelihood, sample
from stage2_prior.compilation import compiled_programs
from stage2_prior.order import cosine_step_sizes, kept_first, seeded_orders
from stage2_prior.sampling import (
    guidance_at,
    guide,
    per_seed_uniforms,
    sample_from_uniform,
    warp_logits,
)
from tests.helpers.compiling import traced
from tests.helpers.priors import any_order_prior, tiny_prior

SEEDS = [7, 8, 9]
TWO = (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11))


def logits_in_order(prior, text_ids, codes, orders):
    """(B,N,K) of whole, uncached passes, by place."""
    fed = prior.stream.text_first(text_ids, codes, orders)
    logits = prior(fed.ids, fed.position_ids, targets=fed.targets).image
    outside = prior.stream.outside_level(orders)
    return logits if outside is None else logits.masked_fill(outside, float("-inf"))


@pytest.mark.parametrize("levels", [None, TWO])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_random_order_sampling_equals_uncached(text_ids, scale, levels):
    prior = any_order_prior(levels) if levels else any_order_prior()
    drawn = sample(prior, text_ids, SEEDS, SamplingOptions(guidance_scale=scale, temperature=0.7))
    assert torch.equal(drawn.orders, seeded_orders(SEEDS, 9))
    conditional = logits_in_order(prior, text_ids, drawn.codes, drawn.orders)
    null = logits_in_order(prior, prior.stream.null_caption(3), drawn.codes, drawn.orders)
    chosen = guide(conditional, null, scale).nan_to_num(float("-inf"))
    classes = prior.stream.image_targets(drawn.codes).gather(1, drawn.orders)
    for i, noise in enumerate(per_seed_uniforms(SEEDS, 9).unbind(1)):
        assert torch.equal(
            sample_from_uniform(warp_logits(chosen[:, i], 0.7, None, None), noise), classes[:, i]
        )
    log_p = conditional.log_softmax(-1).gather(2, classes[..., None]).sum((1, 2))
    torch.testing.assert_close(drawn.log_likelihood, log_p)
    if scale == 1:
        assert drawn.null_log_likelihood is None
    else:
        expected = null.log_softmax(-1).gather(2, classes[..., None]).sum((1, 2))
        torch.testing.assert_close(drawn.null_log_likelihood, expected)


def drawn_by_hand(prior, text_ids, orders, counts, options, codes, first):
    """Codes after each step: every one of them but the `first` known ones resampled from what a
    whole, uncached pass over the step before gives."""
    noise, place, stream = per_seed_uniforms(SEEDS, 9), first, prior.stream
    steps = []
    for count in counts:
        new = codes.clone()
        for target in range(first, place + count):
            # What has not been drawn yet, and siblings, are not known: the target changes places
            # with the first of them.
            swapped, at = orders.clone(), min(target, place)
            swapped[:, [at, target]] = swapped[:, [target, at]]
            branches = [
                logits_in_order(prior, ids, codes, swapped)
                for ids in (text_ids, stream.null_caption(3))
            ]
            logits = guide(*branches, guidance_at(target / 9, options)).nan_to_num(float("-inf"))
            classes = sample_from_uniform(
                warp_logits(logits[:, at], options.temperature, None, options.top_p),
                noise[:, target],
            )
            here = orders[:, target : target + 1]
            new.scatter_(1, here, stream.within_level(classes[:, None], here))
        codes = new
        steps.append(codes)
        place += count
    return steps


@pytest.mark.parametrize("levels", [None, TWO])
@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 2.0, "temperature": 0.8, "top_p": 0.95},
        {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.8)},
        {"guidance_scale": 2.0, "guidance_power": 1.0},
    ],
)
def test_drafted_codes_are_verified_with_full_context(text_ids, levels, known, options):
    prior, options = (
        any_order_prior(levels) if levels else any_order_prior(),
        SamplingOptions(num_inference_steps=4, **options),
    )
    orders = kept_first(seeded_orders(SEEDS, 9), torch.arange(9) < known)
    given = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(1))
    drawn = sample(prior, text_ids, SEEDS, options, known=torch.arange(9) < known, codes=given)
    steps = drawn_by_hand(
        prior, text_ids, orders, cosine_step_sizes(9 - known, 4), options, given, known
    )
    assert torch.equal(drawn.orders, orders) and torch.equal(drawn.codes, steps[-1])
    # Some codes of the third step were changed by what they came to know.
    third = orders[:, : known + sum(cosine_step_sizes(9 - known, 4)[:3])]
    assert not torch.equal(steps[2].gather(1, third), steps[3].gather(1, third))


@pytest.mark.parametrize("steps", [2, 5, 7, 8])
def test_each_step_accepts_at_least_one_sequential_code(text_ids, steps):
    prior = any_order_prior()
    for seeds in ([1, 2, 3], [4, 5, 6], [7, 8, 9]):
        plain, drawn = (
            sample(prior, text_ids, seeds, SamplingOptions(num_inference_steps=n))
            for n in (None, steps)
        )
        in_order = [
            samples.codes.gather(1, samples.orders)[:, :steps] for samples in (plain, drawn)
        ]
        assert torch.equal(*in_order)


def test_multi_code_steps_do_not_depend_on_the_batch(text_ids):
    prior = any_order_prior()
    together = sample(
        prior, text_ids, SEEDS, SamplingOptions(num_inference_steps=3, guidance_scale=2)
    )
    for row in range(3):
        alone = sample(
            prior,
            text_ids[row : row + 1],
            SEEDS[row : row + 1],
            SamplingOptions(num_inference_steps=3, guidance_scale=2),
        )
        assert torch.equal(alone.codes[0], together.codes[row])


def test_one_code_per_step_is_sequential_sampling(text_ids):
    prior = any_order_prior()
    plain, stepped = (
        sample(prior, text_ids, SEEDS, SamplingOptions(num_inference_steps=steps))
        for steps in (None, 9)
    )
    assert torch.equal(plain.codes, stepped.codes)
    torch.testing.assert_close(plain.log_likelihood, stepped.log_likelihood)


def test_multi_code_step_is_one_forward_pass(text_ids):
    prior, lengths = any_order_prior(), []
    for parameter in prior.image_head.parameters():
        torch.nn.init.zeros_(parameter)  # nothing changes what a code is drawn from
    prior.blocks[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    sample(prior, text_ids, SEEDS, SamplingOptions(num_inference_steps=4))
    # The caption; per step the codes of the step before, and the last of them once for each further
    # code; then the codes of the last step but one, for their likelihood.
    assert lengths == [5, 1, 2, 4, 5, 2]


@pytest.mark.parametrize("levels", [None, TWO])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(
    "guidance", [{}, {"guidance_scale": 2}, {"guidance_scale": 2, "guidance_interval": (0.5, 1.0)}]
)
def test_log_likelihood_of_multi_code_steps_is_exact(text_ids, codes, levels, steps, guidance):
    prior = any_order_prior(levels) if levels else any_order_prior()
    options = SamplingOptions(num_inference_steps=steps, temperature=0.5, **guidance)
    known = torch.zeros(3, 9, dtype=torch.bool)
    known[0, :2] = known[1, 4:6] = known[2, 7:] = True
    for given in ({}, {"known": known, "codes": codes.clamp(max=3)}):
        drawn = sample(prior, text_ids, SEEDS, options, **given)
        sampled = ~known if given else torch.ones_like(known)
        log_p = code_log_likelihood(prior, text_ids, drawn.codes, drawn.orders)
        torch.testing.assert_close(drawn.log_likelihood, (log_p * sampled).sum(1))
        if guidance == {"guidance_scale": 2}:
            null_caption = prior.stream.null_caption(3)
            null = code_log_likelihood(prior, null_caption, drawn.codes, drawn.orders)
            torch.testing.assert_close(drawn.null_log_likelihood, (null * sampled).sum(1))
        else:
            assert drawn.null_log_likelihood is None


@pytest.mark.parametrize("steps", [None, 3])
def test_known_codes_are_kept_and_ordered_first(text_ids, codes, steps):
    prior = any_order_prior()
    known = torch.tensor([True, False, True, False, False, True, False, False, False])
    drawn = sample(
        prior,
        text_ids,
        SEEDS,
        SamplingOptions(guidance_scale=2, num_inference_steps=steps),
        known=known,
        codes=codes,
    )
    assert torch.equal(drawn.codes[:, known], codes[:, known])
    assert torch.equal(drawn.orders[:, :3].sort(1).values, torch.tensor([[0, 2, 5]] * 3))
    assert torch.equal(drawn.orders, kept_first(seeded_orders(SEEDS, 9), known))
    free = sample(
        prior, text_ids, SEEDS, SamplingOptions(guidance_scale=2, num_inference_steps=steps)
    )
    assert not torch.equal(free.codes[:, ~known], drawn.codes[:, ~known])
    if steps is None:
        given = code_log_likelihood(prior, text_ids, drawn.codes, drawn.orders)[:, ~known].sum(1)
        torch.testing.assert_close(drawn.log_likelihood, given)


def test_images_can_keep_different_codes(text_ids, codes):
    prior = any_order_prior()
    known = torch.zeros(3, 9, dtype=torch.bool)
    known[0, :2] = known[1, 4:6] = known[2, 7:] = True
    together = sample(prior, text_ids, SEEDS, SamplingOptions(), known=known, codes=codes)
    assert torch.equal(together.codes[known], codes[known])
    for row in range(3):
        part = slice(row, row + 1)
        alone = sample(
            prior,
            text_ids[part],
            SEEDS[part],
            SamplingOptions(),
            known=known[part],
            codes=codes[part],
        )
        assert torch.equal(alone.codes[0], together.codes[row])


def test_raster_prior_continues_known_codes(prior, text_ids, codes):
    known = torch.arange(9) < 3
    drawn = sample(
        prior, text_ids, SEEDS, SamplingOptions(guidance_scale=2), known=known, codes=codes
    )
    assert torch.equal(drawn.codes[:, :3], codes[:, :3])
    given = code_log_likelihood(prior, text_ids, drawn.codes)[:, 3:].sum(1)
    torch.testing.assert_close(drawn.log_likelihood, given)


@pytest.mark.parametrize("order", ["raster", "annealed"])
def test_raster_prior_refuses_other_orders(prior, text_ids, codes, order):
    prior.config.trained_order = order
    with pytest.raises(
        ValueError,
        match="several codes per step need a prior that was trained on random orders, and this one "
        f"knows {order}",
    ):
        sample(prior, text_ids, SEEDS, SamplingOptions(num_inference_steps=4))
    with pytest.raises(ValueError, match=r"codes in any order .* prior\.train\.code_order=random"):
        sample(prior, text_ids, SEEDS, SamplingOptions(), known=torch.arange(9) > 4, codes=codes)


def test_guidance_interval_includes_start_and_excludes_end():
    options = SamplingOptions(guidance_scale=3, guidance_interval=(0.25, 0.5))
    assert [guidance_at(share, options) for share in (0, 0.24, 0.25, 0.49, 0.5, 0.9)] == [
        1,
        1,
        3,
        3,
        1,
        1,
    ]
    rising = SamplingOptions(guidance_scale=3, guidance_power=2.0)
    assert [guidance_at(share, rising) for share in (0, 0.5**0.5)] == pytest.approx([1, 2])


@pytest.mark.parametrize(
    "options",
    [{"guidance_interval": (0.3, 0.7)}, {"guidance_power": 1.0}, {"guidance_interval": (0.5, 1.0)}],
)
def test_unconditional_branch_runs_in_guided_steps_only_with_full_context(prior, text_ids, options):
    rows = []
    prior.blocks[0].register_forward_hook(
        lambda _, inputs, __: rows.append(tuple(inputs[0].shape[:2]))
    )
    options = SamplingOptions(guidance_scale=3, **options)
    drawn = sample(prior, text_ids, SEEDS, options)
    scales = [1.0] * 9
    for i in range(9):
        first, last = options.guidance_interval
        if first <= i / 9 < last:
            scales[i] = (
                3.0
                if options.guidance_power is None
                else 1 + 2 * (1 - math.cos(math.pi * i / 9)) / 2
            )
    guided = [scale != 1 for scale in scales]
    assert sum(shape == (6, 1) for shape in rows) == sum(guided)
    assert sum(shape[0] * shape[1] for shape in rows if shape[0] == 6) == 6 * sum(guided)
    branches = [
        logits_in_raster(prior, ids, drawn.codes)
        for ids in (text_ids, prior.stream.null_caption(3))
    ]
    for i, noise in enumerate(per_seed_uniforms(SEEDS, 9).unbind(1)):
        chosen = guide(branches[0][:, i], branches[1][:, i], scales[i])
        assert torch.equal(sample_from_uniform(chosen, noise), drawn.codes[:, i])
    assert drawn.null_log_likelihood is None


def logits_in_raster(prior, text_ids, codes):
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    with torch.no_grad():
        return prior(ids, torch.arange(ids.shape[1])).image


def test_caption_prefill_is_shared_by_its_images(prior, text_ids):
    sizes = []
    prior.blocks[0].register_forward_hook(
        lambda _, inputs, __: sizes.append(tuple(inputs[0].shape[:2]))
    )
    many = sample(
        prior, text_ids[[0, 1, 0, 1, 0]], [1, 2, 3, 4, 5], SamplingOptions(guidance_scale=2)
    )
    assert sizes[0] == (3, 5)  # two captions and the null caption
    alone = sample(prior, text_ids[:1], [3], SamplingOptions(guidance_scale=2))
    assert torch.equal(many.codes[2], alone.codes[0])


def test_grouped_query_sampling_equals_uncached(text_ids):
    prior = tiny_prior(heads=4, kv_heads=2)
    assert prior.new_cache(3).keys[0].shape == (3, 2, 14, 8)
    drawn = sample(prior, text_ids, SEEDS, SamplingOptions())
    logits = logits_in_raster(prior, text_ids, drawn.codes)
    for i, noise in enumerate(per_seed_uniforms(SEEDS, 9).unbind(1)):
        assert torch.equal(sample_from_uniform(logits[:, i], noise), drawn.codes[:, i])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_inference_steps": 4},
        {"guidance_scale": 2.0, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.0},
    ],
)
def test_compiled_steps_draw_the_same_codes_in_any_order(text_ids, monkeypatch, options):
    prior, options = any_order_prior(), SamplingOptions(**options)
    plain = sample(prior, text_ids, SEEDS, options)
    graphs = traced(monkeypatch)
    compiled = sample(prior, text_ids, SEEDS, options, compiled=True)
    assert torch.equal(compiled.codes, plain.codes)
    torch.testing.assert_close(compiled.log_likelihood, plain.log_likelihood)
    # Reading captions, and the step of one code
    assert len(graphs) == (0 if options.num_inference_steps else 2)


def test_another_number_of_threads_compiles_nothing_again(text_ids, monkeypatch):
    graphs = traced(monkeypatch)
    prior = tiny_prior()
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            sample(prior, text_ids, SEEDS, SamplingOptions(), compiled=True)
    finally:
        torch.set_num_threads(before)
    assert len(graphs) == 2  # one reads captions, one steps


@pytest.mark.slow
def test_compiled_steps_are_cached_per_prior_and_option(text_ids, monkeypatch):
    graphs = traced(monkeypatch)
    raster, other = tiny_prior(), any_order_prior()
    for prior in (raster, other, raster):
        plain = sample(prior, text_ids, SEEDS, SamplingOptions())
        assert torch.equal(
            sample(prior, text_ids, SEEDS, SamplingOptions(), compiled=True).codes, plain.codes
        )
    assert len(graphs) == 4  # each reads captions and steps
    for temperature in (0.5, 0.7):
        options = SamplingOptions(temperature=temperature, top_p=0.9)
        plain = sample(raster, text_ids, SEEDS, options)
        assert torch.equal(
            sample(raster, text_ids, SEEDS, options, compiled=True).codes, plain.codes
        )
    assert len(graphs) == 5  # numbers are no other program


def test_given_orders_are_used(text_ids):
    prior = any_order_prior()
    raster = torch.arange(9).expand(3, 9)
    drawn = sample(prior, text_ids, SEEDS, SamplingOptions(), orders=raster)
    assert torch.equal(drawn.orders, raster)
    torch.testing.assert_close(
        drawn.log_likelihood, code_log_likelihood(prior, text_ids, drawn.codes).sum(1)
    )


def test_samples_in_random_order_follow_the_joint_distribution_of_that_order():
    """Chi-square over all 27 images of a prior with three codes of three kinds, in the order 2,
    0, 1."""
    prior = any_order_prior((Level(grid=(1, 3), num_codes=3),))
    caption = torch.tensor([[1, 5, 6, 7, 2, 0]])
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    order = torch.tensor([[2, 0, 1]])
    expected = (
        code_log_likelihood(prior, caption.repeat(27, 1), every, order.repeat(27, 1)).sum(1).exp()
        * 4000
    )
    assert float(expected.sum()) == pytest.approx(4000, rel=1e-4)
    codes = sample(
        prior,
        caption.repeat(4000, 1),
        list(range(4000)),
        SamplingOptions(),
        orders=order.repeat(4000, 1),
    ).codes
    counts = torch.bincount(codes @ torch.tensor([9, 3, 1]), minlength=27)
    # 26 degrees of freedom: the 99.9% quantile is 54.1.
    assert float(((counts - expected) ** 2 / expected).sum()) < 54.1


def test_known_codes_must_be_given_and_equally_many(text_ids, codes):
    prior = any_order_prior()
    uneven = torch.zeros(3, 9, dtype=torch.bool)
    uneven[0, :2] = uneven[1, :5] = uneven[2, :2] = True
    with pytest.raises(ValueError, match=r"keep \[2, 5\] codes; they must all keep as many"):
        sample(prior, text_ids, SEEDS, SamplingOptions(), known=uneven, codes=codes)
    with pytest.raises(ValueError, match="2 codes are known and none is given"):
        sample(prior, text_ids, SEEDS, SamplingOptions(), known=torch.arange(9) < 2)
    with pytest.raises(ValueError, match="all 9 codes are known"):
        sample(
            prior,
            text_ids,
            SEEDS,
            SamplingOptions(),
            known=torch.ones(9, dtype=torch.bool),
            codes=codes,
        )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_steps_that_are_really_compiled_draw_the_same_codes(text_ids):
    text_ids, seeds = text_ids.repeat(4, 1), range(12)
    for options in (SamplingOptions(), SamplingOptions(guidance_scale=2, top_p=0.9)):
        prior = any_order_prior()
        plain = sample(prior, text_ids, seeds, options)
        for rows in (slice(12), slice(3)):  # few rows are worked out as sums, many as products
            compiled = sample(prior, text_ids[rows], seeds[rows], options, compiled=True)
            assert torch.equal(compiled.codes, plain.codes[rows])
            torch.testing.assert_close(
                compiled.log_likelihood, plain.log_likelihood[rows], rtol=1e-4, atol=1e-4
            )
        assert len(compiled_programs(prior)) == 3


@pytest.mark.slow
def test_compiled_step_is_rebuilt_when_the_prior_changes(text_ids, monkeypatch):
    graphs = traced(monkeypatch)
    prior = any_order_prior()
    sample(prior, text_ids, SEEDS, SamplingOptions(), compiled=True)
    prior.to(torch.bfloat16)
    sample(prior, text_ids, SEEDS, SamplingOptions(), compiled=True)
    assert len(graphs) == 4
    with torch.autocast("cpu", torch.bfloat16):
        sample(prior, text_ids, SEEDS, SamplingOptions(), compiled=True)
    assert len(graphs) == 6
    prior.float()
    for count, dtype in ((8, torch.bfloat16), (10, torch.float16)):
        with torch.autocast("cpu", dtype):
            sample(prior, text_ids, SEEDS, SamplingOptions(), compiled=True)
        assert len(graphs) == count
    sample(prior.train(), text_ids, SEEDS, SamplingOptions(), compiled=True)
    assert len(graphs) == 12
