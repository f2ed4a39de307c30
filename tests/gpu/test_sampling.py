"""Sampling on a GPU: compiled and captured steps, batches, guidance, several codes per step,
running out of memory."""

from __future__ import annotations

import warnings

import pytest
import torch

from pipeline.inference.batching import sample_codes_batched
from stage2_prior import (
    Level,
    PriorConfig,
    PriorModule,
    SamplingOptions,
    StreamConfig,
    code_log_likelihood,
    sample,
)
from stage2_prior.sampling import guide, per_seed_uniforms, sample_from_uniform, warp_logits
from tests.helpers.priors import any_order_prior, tiny_prior

pytestmark = pytest.mark.gpu
SEEDS = [7, 8, 9]
TWO_LEVELS = (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11))


@pytest.fixture
def text_ids() -> torch.Tensor:
    return torch.tensor([[1, 5, 6, 7, 2, 0], [1, 9, 2, 0, 0, 0], [1, 5, 11, 12, 13, 2]])


def test_plain_sampling_equals_that_of_the_cpu(text_ids, device):
    for options in (
        SamplingOptions(),
        SamplingOptions(guidance_scale=2, top_k=5),
        SamplingOptions(guidance_scale=2, top_p=0.9, min_p=0.01),
    ):
        expected = sample(tiny_prior(), text_ids, SEEDS, options)
        found = sample(tiny_prior().to(device), text_ids, SEEDS, options)
        assert torch.equal(found.codes.cpu(), expected.codes)
        torch.testing.assert_close(
            found.log_likelihood.cpu(), expected.log_likelihood, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("levels", [None, TWO_LEVELS])
@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.8), "top_p": 0.9}]
)
def test_compiled_and_captured_sampling_equals_plain_sampling(text_ids, levels, options, device):
    """On CUDA the compiled steps are captured as graphs; the second call captures its own."""
    prior, how = (
        (any_order_prior(levels) if levels else any_order_prior()).to(device),
        SamplingOptions(**options),
    )
    plain = sample(prior, text_ids, SEEDS, how)
    for _ in range(2):
        compiled = sample(prior, text_ids, SEEDS, how, compiled=True)
        assert torch.equal(compiled.codes, plain.codes)
        torch.testing.assert_close(
            compiled.log_likelihood, plain.log_likelihood, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_an_image_is_the_same_alone_and_in_a_batch(text_ids, compiled, device):
    prior, options = tiny_prior().to(device), SamplingOptions(guidance_scale=2, temperature=0.8)
    batch = sample(prior, text_ids.repeat(8, 1), range(24), options, compiled=compiled)
    for row in (0, 11, 23):
        alone = sample(prior, text_ids[row % 3][None], [row], options, compiled=compiled)
        assert torch.equal(alone.codes[0], batch.codes[row])
        torch.testing.assert_close(
            alone.log_likelihood[0], batch.log_likelihood[row], rtol=1e-4, atol=1e-4
        )


def test_guided_codes_equal_two_uncached_passes(text_ids, device):
    prior, scale = tiny_prior().to(device), 3.0
    drawn = sample(prior, text_ids, SEEDS, SamplingOptions(guidance_scale=scale))
    logits = []
    for caption in (text_ids.to(device), prior.stream.null_caption(3, device)):
        fed = prior.stream.text_first(caption, drawn.codes)
        logits.append(prior(fed.ids, fed.position_ids, targets=fed.targets).image)
    chosen, noise = guide(*logits, scale), per_seed_uniforms(SEEDS, 9).to(device)
    assert torch.equal(
        sample_from_uniform(warp_logits(chosen, 1.0, None, None), noise), drawn.codes
    )


@pytest.mark.parametrize("levels", [None, TWO_LEVELS])
def test_several_codes_per_step_equal_those_of_the_cpu(text_ids, levels, device):
    for steps in (3, 9):
        options = SamplingOptions(guidance_scale=2, num_inference_steps=steps)
        cpu, there = (
            (any_order_prior(levels) if levels else any_order_prior()).to(where)
            for where in ("cpu", device)
        )
        expected, found = (
            sample(cpu, text_ids, SEEDS, options),
            sample(there, text_ids, SEEDS, options),
        )
        assert torch.equal(found.codes.cpu(), expected.codes)
    # As many steps as codes
    assert torch.equal(
        sample(there, text_ids, SEEDS, SamplingOptions(guidance_scale=2)).codes, found.codes
    )


def test_kept_codes_are_kept_in_any_order(text_ids, device):
    prior = any_order_prior().to(device)
    codes, known = torch.randint(0, 11, (3, 9), device=device), torch.arange(9) % 2 == 0
    drawn = sample(
        prior, text_ids, SEEDS, SamplingOptions(guidance_scale=2), known=known, codes=codes
    )
    assert torch.equal(drawn.codes[:, known], codes[:, known])


def test_score_equals_log_likelihood_of_sampling(text_ids, device):
    prior = tiny_prior().to(device)
    drawn = sample(prior, text_ids, SEEDS, SamplingOptions())
    scored = code_log_likelihood(prior, text_ids, drawn.codes).sum(1)
    torch.testing.assert_close(scored, drawn.log_likelihood, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("allowed", ["every 16th", "top_k", "top_p"])
def test_filtered_codes_of_16384_are_never_sampled(allowed, device):
    """A parallel cumulative sum is not flat where probabilities are 0."""
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 16384, generator=draws).to(device)
    match allowed:
        case "top_k":
            logits = warp_logits(logits, 1.0, 100, None)
        case "top_p":
            logits = warp_logits(logits, 1.0, None, 0.9)
        case _:
            logits = logits.masked_fill(torch.arange(16384, device=device) % 16 != 3, float("-inf"))
    sums = logits.softmax(-1).cumsum(-1)
    compiled_draw = torch.compile(sample_from_uniform, dynamic=False)
    edges = (sums / sums[:, -1:]).clamp(0, 1 - 2**-24)[:, ::16]  # where rounding decides
    for row, uniform in zip(logits, edges, strict=True):
        for part in uniform.split(
            64
        ):  # as many rows as sampling has: there a compiled sum is split over blocks
            for choose in (sample_from_uniform, compiled_draw):
                assert row[choose(row.expand(len(part), -1), part)].isfinite().all()


def test_batch_is_halved_when_gpu_memory_runs_out(cuda):
    """Memory as it was measured is enough; what the process may take is less."""
    stream = StreamConfig(
        text_vocab_size=300, text_length=8, levels=(Level(grid=(16, 16), num_codes=64),)
    )
    prior = PriorModule(PriorConfig(width=512, depth=4, heads=8), stream).to(cuda).eval()
    text = torch.randint(3, 300, (128, 8))
    expected = sample_codes_batched(prior, text[:8], range(8), SamplingOptions(), batch_size=8)
    torch.cuda.empty_cache()
    cache = 2 * 4 * 128 * 512 * stream_length(prior) * 4
    try:
        room = torch.cuda.memory_allocated() + 0.8 * cache
        torch.cuda.set_per_process_memory_fraction(
            room / torch.cuda.get_device_properties(cuda).total_memory
        )
        with pytest.warns(
            UserWarning, match="out of memory with 128 images at a time; continuing with 64"
        ):
            drawn = sample_codes_batched(prior, text, range(128), SamplingOptions(), batch_size=128)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert drawn.codes.shape == (128, 256)
    assert torch.equal(drawn.codes[:8], expected.codes)


def stream_length(prior: PriorModule) -> int:
    return prior.stream.length


def test_small_batches_do_not_warn(text_ids, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_codes_batched(
            tiny_prior().to(device), text_ids, SEEDS, SamplingOptions(), batch_size=2
        )
