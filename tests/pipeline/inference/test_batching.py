"""Batches: how they are split, what happens when memory is short, and when steps are compiled."""

from __future__ import annotations

import warnings

import pytest
import torch

from pipeline.inference import batching
from pipeline.inference.batching import bytes_per_image, even_batches, sample_codes_batched
from pipeline.runtime import threads
from stage2_prior import SamplingOptions, sample
from tests.helpers.priors import any_order_prior, tiny_prior

CAPTIONS = torch.tensor(
    [
        [1, 5, 6, 7, 2, 0],
        [1, 9, 2, 0, 0, 0],
        [1, 5, 11, 12, 13, 2],
        [1, 4, 2, 0, 0, 0],
        [1, 8, 8, 2, 0, 0],
    ]
)
SEEDS = [1, 2, 3, 4, 5]


@pytest.fixture
def prior():
    return tiny_prior()


def test_batches_are_few_and_even():
    assert [(p.start, p.stop) for p in even_batches(100, 64)] == [(0, 50), (50, 100)]
    assert [p.stop - p.start for p in even_batches(10, 4)] == [4, 4, 2]
    assert [p.stop - p.start for p in even_batches(3, 64)] == [3]


def test_an_image_is_the_same_in_any_batch(prior):
    whole = sample(prior, CAPTIONS, SEEDS, SamplingOptions(guidance_scale=2))
    for size in (1, 2, 4, 64):
        parts = sample_codes_batched(
            prior, CAPTIONS, SEEDS, SamplingOptions(guidance_scale=2), batch_size=size
        )
        assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.orders, whole.orders)
        torch.testing.assert_close(parts.log_likelihood, whole.log_likelihood)
        torch.testing.assert_close(parts.null_log_likelihood, whole.null_log_likelihood)


def test_known_codes_stay_with_their_rows():
    prior = any_order_prior()
    codes = torch.randint(0, 11, (5, 9), generator=torch.Generator().manual_seed(1))
    known = torch.zeros(5, 9, dtype=torch.bool)
    for row in range(5):
        known[row, row : row + 3] = True
    drawn = sample_codes_batched(
        prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=2, known=known, codes=codes
    )
    assert torch.equal(drawn.codes[known], codes[known])
    shared = sample_codes_batched(
        prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=2, known=known[0], codes=codes
    )
    assert torch.equal(shared.codes[:, :3], codes[:, :3])


def test_oversized_batches_shrink_with_one_warning(prior, monkeypatch):
    need = bytes_per_image(prior, SamplingOptions())
    monkeypatch.setattr(batching, "free_memory", lambda device: int(2.9 * need))
    with pytest.warns(
        UserWarning, match="5 images at a time do not fit the free memory; continuing with 2"
    ) as said:
        drawn = sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=64)
    assert len(said) == 1 and torch.equal(
        drawn.codes, sample(prior, CAPTIONS, SEEDS, SamplingOptions()).codes
    )


def test_error_when_one_image_does_not_fit(prior, monkeypatch):
    monkeypatch.setattr(batching, "free_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="one image of 9 codes does not fit the memory of cpu"):
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=64)


def test_no_compiler_means_no_compiling_unless_requested(prior, monkeypatch):
    monkeypatch.setattr(batching, "can_compile", lambda device: False)
    monkeypatch.setattr(batching, "COMPILE_SECONDS", -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=1)
    with pytest.raises(ValueError, match=r"compile is on, and there is no C\+\+ compiler"):
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=1, compile="on")


def test_memory_estimate_grows_with_the_inputs():
    plain = bytes_per_image(tiny_prior(heads=4), SamplingOptions())
    assert bytes_per_image(tiny_prior(heads=4), SamplingOptions(guidance_scale=2)) == 2 * plain
    # A step of several codes may feed all of them: logits of 8 more, 11 classes each.
    assert (
        bytes_per_image(tiny_prior(heads=4), SamplingOptions(num_inference_steps=4))
        >= plain + 8 * 11 * 4
    )
    assert (
        bytes_per_image(tiny_prior(heads=4, kv_heads=1), SamplingOptions())
        < plain
        < bytes_per_image(tiny_prior(heads=4, depth=4), SamplingOptions())
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch(prior, monkeypatch, error):
    sizes = []

    def full(prior, ids, *arguments, **options):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise error
        return sample(prior, ids, *arguments, **options)

    monkeypatch.setattr(batching, "sample", full)
    with pytest.warns(
        UserWarning, match="out of memory with 5 images at a time; continuing with 2"
    ) as said:
        drawn = sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=64)
    assert sizes == [5, 2, 2, 1] and len(said) == 1
    assert torch.equal(drawn.codes, sample(prior, CAPTIONS, SEEDS, SamplingOptions()).codes)


def test_one_image_that_does_not_fit_is_an_error(prior, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batching, "sample", full)
    with pytest.raises(
        MemoryError,
        match="one image of 9 codes does not fit the memory of cpu; close other programs",
    ):
        sample_codes_batched(prior, CAPTIONS[:1], [1], SamplingOptions(), batch_size=64)


def test_other_errors_are_raised_unchanged(prior, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(batching, "sample", broken)
    with pytest.raises(RuntimeError, match="something else"):
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=64)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.01, [False] * 5), (30.0, [False, True, True, True, True])]
)
def test_auto_compiles_when_remaining_work_is_long(prior, monkeypatch, seconds, expected):
    asked, clock = [], iter(range(10**6))

    def noted(*arguments, compiled: bool, **options):
        asked.append(compiled)
        return sample(*arguments, **options)

    monkeypatch.setattr(batching, "can_compile", lambda device: True)
    monkeypatch.setattr(batching, "sample", noted)
    monkeypatch.setattr(batching.time, "perf_counter", lambda: next(clock) * seconds)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=1)
    assert asked == expected
    assert [
        "seconds of sampling are left, so the steps are compiled" in str(w.message) for w in said
    ] == [True] * any(expected)


@pytest.mark.parametrize(("compile", "expected"), [("on", True), ("off", False)])
def test_compiling_can_be_requested_or_refused(prior, monkeypatch, compile, expected):
    asked = []

    def noted(*arguments, compiled: bool, **options):
        asked.append(compiled)
        return sample(*arguments, **options)

    monkeypatch.setattr(batching, "can_compile", lambda device: True)
    monkeypatch.setattr(batching, "sample", noted)
    sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=2, compile=compile)
    assert set(asked) == {expected}
    with pytest.raises(ValueError, match="compile is 'yes'; choose auto, on or off"):
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=2, compile="yes")


def test_images_are_sampled_on_the_cores_that_are_free(prior, monkeypatch):
    monkeypatch.setattr(threads, "is_chosen", lambda _: False)
    monkeypatch.setattr(threads.FreeThreads, "_fitting", lambda self: 1)
    numbers = []

    def watched(*arguments, **options):
        numbers.append(torch.get_num_threads())
        return sample(*arguments, **options)

    monkeypatch.setattr(batching, "sample", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sample_codes_batched(prior, CAPTIONS, SEEDS, SamplingOptions(), batch_size=64)
        assert (numbers, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
