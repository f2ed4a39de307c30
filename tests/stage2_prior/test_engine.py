"""Requests that join and leave a running table: the same codes as alone, order, cancelling."""

from __future__ import annotations

import random
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import stage2_prior.compilation
import stage2_prior.engine
import stage2_prior.table
from stage2_prior import (
    CompiledSteps,
    Engine,
    Filters,
    Finished,
    Level,
    PriorModule,
    SampleRequest,
    Samples,
    SamplingOptions,
    StepShape,
    code_log_likelihood,
    sample,
)
from stage2_prior.compilation import Steps, capture_cuda_graph
from stage2_prior.step import advance, prefill
from stage2_prior.table import Table
from tests.helpers.priors import any_order_prior, tiny_prior

TWO = (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11))
CAPTIONS = torch.tensor(
    [[0, 3, 4, 1, 2, 2], [0, 5, 1, 2, 2, 2], [0, 6, 7, 8, 1, 2], [0, 9, 9, 1, 2, 2]]
)


def random_options(draw: random.Random) -> SamplingOptions:
    return SamplingOptions(
        guidance_scale=draw.choice([1.0, 1.0, 2.0, 3.0]),
        guidance_interval=draw.choice([(0.0, 1.0), (0.2, 0.7)]),
        guidance_power=draw.choice([None, 1.5]),
        temperature=draw.choice([0.0, 0.5, 1.0]),
        top_k=draw.choice([None, None, 3, 40]),
        top_p=draw.choice([None, None, 0.8, 1.0]),
        min_p=draw.choice([None, None, 0.05]),
    )


def random_request(draw: random.Random, prior: PriorModule, seed: int) -> SampleRequest:
    """Of any options; one in three has known codes: anywhere, or the first ones. Where the order is
    free, every other one has several codes per step."""
    length = prior.stream.image_length
    any_order = prior.config.trained_order == "random"
    kept = {}
    if not draw.randrange(3):
        number = draw.randrange(1, length)
        known = torch.zeros(length, dtype=torch.bool)
        known[draw.sample(range(length), number) if any_order else list(range(number))] = True
        kept = {"known": known, "codes": torch.tensor(draw.choices(range(4), k=length))}
    caption = CAPTIONS[draw.randrange(len(CAPTIONS))]
    options = random_options(draw)
    if any_order and draw.randrange(2):
        left = length - int(kept["known"].sum()) if kept else length
        options = replace(options, num_inference_steps=draw.randrange(1, left + 1))
    return SampleRequest(text_ids=caption, seed=seed, options=options, **kept)


def alone(prior: PriorModule, request: SampleRequest) -> Samples:
    """By `sample`."""
    return sample(
        prior,
        request.text_ids[None],
        [request.seed],
        request.options,
        known=None if request.known is None else request.known[None],
        codes=None if request.codes is None else request.codes[None],
    )


def assert_same(finished: Finished, expected: Samples) -> None:
    found = finished.samples
    assert found is not None and torch.equal(found.codes, expected.codes)
    assert torch.equal(found.orders, expected.orders)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    assert (found.null_log_likelihood is None) == (expected.null_log_likelihood is None)
    if found.null_log_likelihood is not None:
        torch.testing.assert_close(found.null_log_likelihood, expected.null_log_likelihood)


def assert_exact(prior: PriorModule, request: SampleRequest, finished: Finished) -> None:
    """The log-likelihood is that of an uncached pass over what was sampled."""
    found = finished.samples
    assert found is not None
    log_p = code_log_likelihood(prior, request.text_ids[None], found.codes, found.orders)[0]
    sampled = log_p if request.known is None else log_p[~request.known]
    torch.testing.assert_close(found.log_likelihood[0], sampled.sum())


@pytest.mark.parametrize(
    ("prior", "count"),
    [
        (any_order_prior(), 200),
        (tiny_prior(kv_heads=1), 20),
        (tiny_prior(TWO), 20),
        (any_order_prior(TWO, kv_heads=1), 20),
    ],
    ids=["any-order", "shared-heads", "two-levels", "any-order-two-levels"],
)
def test_codes_do_not_depend_on_what_else_is_sampled(prior, count):
    draw = random.Random(0)
    engine = Engine(prior, 8)
    requests: dict[int, SampleRequest] = {}
    finished: list[Finished] = []
    cancelled = set()
    for seed in range(count):
        request = random_request(draw, prior, seed)
        requests[engine.submit(request)] = request
        if not draw.randrange(8):
            gone = draw.choice(list(requests))
            if engine.cancel(gone):
                cancelled.add(gone)
        for _ in range(draw.randrange(6)):
            finished += engine.step()
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    assert cancelled and engine.step() == []
    assert sorted(one.ticket for one in finished) == sorted(set(requests) - cancelled)
    for one in finished:
        assert_same(one, alone(prior, requests[one.ticket]))
        assert_exact(prior, requests[one.ticket], one)


def test_known_codes_of_both_kinds_are_read_where_they_join_at_one_step():
    """The first rows and the last ones have as many; an image is active between them."""
    prior = any_order_prior()
    engine = Engine(prior, 6)
    requests = {}
    for seed, number, steps in ((0, 0, None), (1, 3, None), (2, 3, 2), (3, 5, None), (4, 5, 3)):
        kept = {"known": torch.arange(9) < number, "codes": torch.arange(9)} if number else {}
        request = SampleRequest(
            text_ids=CAPTIONS[seed % 4],
            seed=seed,
            options=SamplingOptions(num_inference_steps=steps),
            **kept,
        )
        requests[engine.submit(request)] = request
        if not seed:
            engine.step()
    finished = []
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    assert sorted(one.ticket for one in finished) == sorted(requests)
    for one in finished:
        assert_exact(prior, requests[one.ticket], one)
        assert_same(one, alone(prior, requests[one.ticket]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_steps_sample_the_same_codes(prior):
    """Steps are compiled while images are in the table; the engine then takes these steps."""
    draw = random.Random(1)
    options = SamplingOptions(guidance_scale=2.0, top_k=5)
    filters = Filters.of([options])
    shapes = [StepShape.of_images(n, guided=True, filters=filters) for n in (1, 2)]
    compiled = CompiledSteps(prior)
    engine = Engine(prior, 4, steps=compiled)
    requests = {}
    finished = []
    for seed in range(6):
        request = SampleRequest(text_ids=CAPTIONS[seed % 4], seed=seed, options=options)
        requests[engine.submit(request)] = request
        if seed == 1:
            compiled.compile(shapes[0])
            compiled.compile(shapes[1])
        for _ in range(draw.randrange(4)):
            finished += engine.step()
    assert all(compiled.advance(shape) is not None for shape in shapes)
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    assert sorted(one.ticket for one in finished) == sorted(requests)
    for one in finished:
        assert_same(one, alone(prior, requests[one.ticket]))
    assert len(finished) == 6


def plain(seed: int, guidance_scale: float = 1.0) -> SampleRequest:
    return SampleRequest(
        text_ids=CAPTIONS[0], seed=seed, options=SamplingOptions(guidance_scale=guidance_scale)
    )


def test_requests_are_served_in_order_and_a_large_one_is_not_passed(prior):
    engine = Engine(prior, 2)
    first, wide, third = (engine.submit(plain(i, scale)) for i, scale in enumerate((1, 2, 1)))
    engine.step()
    # The second needs two rows and one is free; the third would fit, and waits behind it.
    assert (engine.num_active, engine.num_waiting) == (1, 2)
    finished = []
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    assert [one.ticket for one in finished] == [first, wide, third]


def test_a_cancelled_request_frees_its_rows_for_the_next_step(prior):
    engine = Engine(prior, 2)
    first = engine.submit(plain(0, 2.0))
    second = engine.submit(plain(1, 2.0))
    engine.step()
    assert engine.cancel(first) and not engine.cancel(first)
    for _ in range(prior.stream.image_length):
        finished = engine.step()
    assert [one.ticket for one in finished] == [second]
    waiting = [engine.submit(plain(i, 2.0)) for i in range(2)]
    engine.step()
    assert engine.cancel(waiting[1]) and engine.num_waiting == 0


def wide(seed: int, steps: int, guidance_scale: float = 1.0) -> SampleRequest:
    options = SamplingOptions(guidance_scale=guidance_scale, num_inference_steps=steps)
    return SampleRequest(text_ids=CAPTIONS[1], seed=seed, options=options)


def test_codes_per_step_of_one_image_change_nothing_for_the_others(monkeypatch):
    """Each kind is computed on its own, no wider than it needs; all rows are in use."""
    widths = []

    def counted(prior, tables, cache, rows, layout, filters, width):
        widths.append((len(rows.filled), width))
        advance(prior, tables, cache, rows, layout, filters, width)

    monkeypatch.setattr(stage2_prior.table, "advance", counted)
    prior = any_order_prior()
    engine = Engine(prior, 8)
    requests = [plain(0, 2.0), wide(1, 3, 2.0), wide(2, 3), plain(3), wide(4, 2, 2.0)]
    tickets = {engine.submit(request): request for request in requests}
    finished = engine.step()
    assert widths == [(3, 1), (5, 3)]  # 3 rows, since 4 would be one of the others
    assert engine.num_active == 5
    while engine.num_active:
        finished += engine.step()
    assert {rows for rows, width in widths if width == 1} <= {3, 4}
    for one in finished:
        assert_same(one, alone(prior, tickets[one.ticket]))
    assert engine.num_sampled == 5 * prior.stream.image_length


def test_progress_counts_codes_of_several_per_step():
    engine = Engine(any_order_prior(), 2)
    ticket = engine.submit(wide(0, 3))
    seen = []
    while not engine.step():
        seen += [engine.progress[ticket]]
        there = engine.codes_so_far(ticket)[1]
        assert int(there.sum()) == seen[-1].now
    counts = [one.now for one in seen]
    assert counts[0] > 0 and counts[-1] == 9 and counts == sorted(counts)
    assert [one.before for one in seen] == [0, *counts[:-1]]


def test_images_of_several_codes_per_step_are_together_as_far_as_the_bound_allows(monkeypatch):
    """Of 2 rows each and about 12 inputs per step; more wait, and keep their codes."""
    monkeypatch.setattr(stage2_prior.engine, "_MOST_TOKENS", 50)
    prior = any_order_prior()
    engine = Engine(prior, 16)
    requests = [wide(seed, 2, 2.0) for seed in range(4)]
    tickets = {engine.submit(request): request for request in requests}
    finished = []
    active = []
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
        active.append(engine.num_active)
    assert max(active) == 2
    assert sorted(one.ticket for one in finished) == sorted(tickets)
    for one in finished:
        assert_same(one, alone(prior, tickets[one.ticket]))
    monkeypatch.setattr(stage2_prior.engine, "_MOST_TOKENS", 10)
    engine.submit(wide(9, 1, 2.0))  # more than the bound, alone
    assert engine.step() == [] and engine.num_active == 1


def test_an_image_of_several_codes_per_step_can_leave_at_any_step():
    prior = any_order_prior()
    engine = Engine(prior, 8)
    gone, stays = engine.submit(wide(1, 4, 2.0)), engine.submit(wide(2, 4, 2.0))
    engine.step()
    assert engine.cancel(gone)
    finished = []
    while engine.num_active:
        finished += engine.step()
    assert [one.ticket for one in finished] == [stays]
    assert_same(finished[0], alone(prior, wide(2, 4, 2.0)))


def test_logits_of_several_codes_that_are_not_finite_end_their_image_alone():
    prior = any_order_prior()
    engine = Engine(prior, 4)
    good, bad = engine.submit(wide(5, 4)), engine.submit(wide(6, 4))
    engine.step()
    with torch.inference_mode():
        engine._table.cache.values[0][2, :, 0] = float(
            "nan"
        )  # the last row is that of the first image
    finished = {}
    while engine.num_active:
        finished |= {one.ticket: one for one in engine.step()}
    assert finished[bad].samples is None
    assert_same(finished[good], alone(prior, wide(5, 4)))


def counted_steps(read: list[list[int]]) -> Steps:
    """Plain steps; captions that are read are added to the list."""

    class CountedSteps(Steps):
        @staticmethod
        def prefill(prior, tables, cache, ids):
            read.extend(ids.tolist())
            prefill(prior, tables, cache, ids)

    return CountedSteps()


def test_a_caption_is_read_once(prior, monkeypatch):
    read = []
    engine = Engine(prior, 16, steps=counted_steps(read))
    for seed in range(6):
        engine.submit(plain(seed, 2.0))
        engine.step()
    null = prior.stream.null_caption(1)[0, :-1].tolist()
    assert read == [CAPTIONS[0, :-1].tolist(), null]


def test_codes_so_far_are_the_first_of_the_finished_image(prior):
    engine = Engine(prior, 2)
    ticket = engine.submit(plain(3))
    for _ in range(4):
        engine.step()
    codes, there = engine.codes_so_far(ticket)
    assert there.tolist() == [True] * 4 + [False] * 5 and not codes[4:].any()
    finished = []
    while not finished:
        finished = engine.step()
    assert torch.equal(finished[0].samples.codes[0, :4], codes[:4])
    with pytest.raises(KeyError, match=f"no active image has the ticket {ticket}"):
        engine.codes_so_far(ticket)


def test_logits_that_are_not_finite_end_their_image_and_no_other(prior):
    engine = Engine(prior, 4)
    good = engine.submit(plain(5))
    engine.step()
    bad = engine.submit(plain(6))
    engine.step()
    with torch.inference_mode():
        engine._table.cache.values[0][1, :, 0] = float("nan")
        engine._table.cache.keys[0][1, :, 0] = float("nan")
    finished = []
    while engine.num_active:
        finished += engine.step()
    again = engine.submit(plain(5))
    other = engine.submit(plain(6))
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    by_ticket = {one.ticket: one for one in finished}
    assert by_ticket[bad].samples is None
    for ticket, seed in ((good, 5), (again, 5), (other, 6)):
        assert_same(by_ticket[ticket], alone(prior, plain(seed)))


def test_logits_of_the_null_caption_that_are_not_finite_end_the_image(prior):
    engine = Engine(prior, 2)
    engine.submit(plain(5, 2.0))
    engine.step()
    with torch.inference_mode():
        engine._table.cache.values[0][1, :, 0] = float("nan")
    finished = []
    while engine.num_active:
        finished += engine.step()
    assert [(one.samples, one.failed_step) for one in finished] == [(None, 1)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_requests_that_could_not_start_wait_in_their_order(prior, monkeypatch, error):
    engine = Engine(prior, 4)
    tickets = [engine.submit(plain(seed, 2.0)) for seed in range(3)]

    def fail(*_, **__):
        raise error("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "write", fail)
        with pytest.raises(error, match="no memory"):
            engine.step()
    assert (engine.num_active, engine.num_waiting) == (0, 3)
    finished = []
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    assert [one.ticket for one in finished] == tickets
    for seed, one in enumerate(finished):
        assert_same(one, alone(prior, plain(seed, 2.0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"codes": torch.zeros(5, dtype=torch.long)},
            "the codes are 5 of torch.int64 per image; give 9 integers",
        ),
        ({"codes": torch.zeros(9)}, "the codes are 9 of torch.float32 per image; give 9 integers"),
        ({"codes": torch.full((9,), 11)}, "a known code is 11; there it must be 0 to 10"),
        ({"codes": torch.full((9,), -1)}, "a known code is -1; there it must be 0 to 10"),
        ({"order": torch.zeros(9, dtype=torch.long)}, "each row must have the numbers 0 to 8 once"),
        ({"order": torch.arange(5)}, "each row must have the numbers 0 to 8 once"),
        ({"seed": 2**64}, "the seed is 18446744073709551616"),
        ({"text_ids": torch.full((6,), 20)}, "ids out of range; they must be 0 to 19"),
    ],
)
def test_a_request_that_no_step_could_take_is_refused_when_it_is_asked(change, words):
    """In the queue it would stop all others."""
    prior = any_order_prior()
    engine = Engine(prior, 2)
    request = SampleRequest(
        text_ids=CAPTIONS[0],
        seed=0,
        options=SamplingOptions(),
        known=torch.arange(9) < 3,
        codes=torch.arange(9),
        order=torch.arange(9),
    )
    with pytest.raises(ValueError, match=words):
        engine.submit(replace(request, **change))
    engine.submit(request)
    while engine.num_active or engine.num_waiting:
        finished = engine.step()
    assert finished[0].samples.codes[0, :3].tolist() == [0, 1, 2]


def test_a_known_code_of_another_level_is_refused():
    codes = torch.tensor([4, *range(8)])
    request = SampleRequest(
        text_ids=CAPTIONS[0],
        seed=0,
        options=SamplingOptions(),
        known=torch.arange(9) < 1,
        codes=codes,
    )
    with pytest.raises(ValueError, match="a known code is 4; there it must be 0 to 3"):
        Engine(any_order_prior(TWO), 2).submit(request)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_known_codes_may_be_of_any_integer_type(dtype):
    """Ids of the vocabulary need more digits than the codes have."""
    small = any_order_prior(code_dim=0)
    prior = PriorModule(
        small.model_config, replace(small.stream.config, text_vocab_size=300)
    ).eval()
    prior.config.trained_order = "random"
    known = torch.arange(9) < 4
    found = [
        sample(prior, CAPTIONS[:1], [3], SamplingOptions(), known=known, codes=codes).codes
        for codes in (torch.arange(9)[None], torch.arange(9, dtype=dtype)[None])
    ]
    assert torch.equal(*found) and found[1][0, :4].tolist() == [0, 1, 2, 3]


def test_known_codes_are_read_in_parts_of_bounded_size(monkeypatch):
    prior = any_order_prior()
    known = (torch.arange(9) < 8).expand(12, -1)
    codes = torch.arange(9).expand(12, -1)

    def sampled() -> Samples:
        captions = CAPTIONS.repeat(3, 1)
        return sample(prior, captions, range(12), SamplingOptions(), known=known, codes=codes)

    expected = sampled()
    read = []
    plain_features = PriorModule.features

    def counted(self, ids, *arguments, **options):
        read.append(ids.numel())
        return plain_features(self, ids, *arguments, **options)

    monkeypatch.setattr(PriorModule, "features", counted)
    monkeypatch.setattr(stage2_prior.table, "_TOKENS_READ", 20)
    found = sampled()
    assert torch.equal(found.codes, expected.codes)
    assert read[1:-1] and max(read[1:-1]) == 16  # two rows of eight; a caption before, a step after


def test_the_null_caption_stays_whatever_captions_come(prior):
    """It is the oldest that is kept where many others join at once."""
    read = []
    engine = Engine(prior, 40, steps=counted_steps(read))
    for start in (0, 17):
        for number in range(start, start + 17):
            caption = torch.tensor([0, 3 + number // 10, 3 + number % 10, 1, 2, 2])
            options = SamplingOptions(guidance_scale=2.0)
            engine.submit(SampleRequest(text_ids=caption, seed=number, options=options))
        while engine.num_active or engine.num_waiting:
            engine.step()
    assert read.count(prior.stream.null_caption(1)[0, :-1].tolist()) == 1


def test_samples_can_be_changed_and_be_part_of_a_gradient(prior):
    engine = Engine(prior, 1)
    engine.submit(plain(0))
    while not (finished := engine.step()):
        pass
    for samples in (finished[0].samples, alone(prior, plain(0))):
        samples.codes[0, 0] = 3
        weight = torch.ones(1, requires_grad=True)
        (weight * samples.log_likelihood).sum().backward()
        assert weight.grad is not None


def test_the_default_device_changes_nothing(prior):
    request = replace(plain(4, 2.0))
    expected = alone(prior, request)
    with torch.device("meta"):
        found = sample(prior, CAPTIONS[:1], [4], request.options)
    assert torch.equal(found.codes, expected.codes)


def test_codes_so_far_are_codes_where_logits_of_a_later_level_are_not_finite():
    prior = tiny_prior(TWO)
    engine = Engine(prior, 1)
    ticket = engine.submit(plain(5))
    engine.step()
    with torch.inference_mode():
        engine._table.cache.values[0][0, :, 0] = float("nan")
    engine.step()
    codes, there = engine.codes_so_far(ticket)
    assert there.sum() == 2 and codes.min() >= 0


def test_steps_that_were_compiled_for_another_precision_are_not_used(prior):
    steps = CompiledSteps(prior)
    shape = StepShape.of_images(1, guided=False, filters=Filters.of([SamplingOptions()]))
    steps._ready[shape] = (stage2_prior.compilation._computing(prior), advance)
    assert steps.advance(shape) is advance
    prior.to(torch.bfloat16)
    assert steps.advance(shape) is None


def test_a_graph_is_captured_on_the_device_of_its_prior(monkeypatch):
    """torch's own stream for graphs is of the device that was current at the first one."""
    used = []

    @contextmanager
    def recorded(*arguments, **options):
        used.append((arguments, options))
        yield

    graph = SimpleNamespace(replay="replay")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream", device))
    monkeypatch.setattr(torch.cuda, "device", recorded)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    device = torch.device("cuda:1")
    steps = []
    assert capture_cuda_graph(lambda: steps.append(1), device) == "replay"
    assert steps == [1]
    assert used[0] == ((device,), {})
    assert used[1][0] == (graph,) and used[1][1]["stream"] == ("stream", device)


def test_what_an_engine_cannot_do_is_refused_when_it_is_asked(prior):
    with pytest.raises(ValueError, match="num_rows is 0; it must be at least 1"):
        Engine(prior, 0)
    with pytest.raises(ValueError, match="num_rows is 1, and a guided image needs 2"):
        Engine(prior, 1).submit(plain(0, 2.0))
    engine = Engine(prior, 2)
    with pytest.raises(ValueError, match=r"the caption has the shape \(5,\), and .* \(6,\)"):
        engine.submit(replace(plain(0), text_ids=CAPTIONS[0, :5]))
    several = SampleRequest(
        text_ids=CAPTIONS[0], seed=0, options=SamplingOptions(num_inference_steps=2)
    )
    with pytest.raises(ValueError, match="several codes per step need a prior that was trained"):
        engine.submit(several)
    too_many = replace(several, options=SamplingOptions(num_inference_steps=10))
    with pytest.raises(ValueError, match="it must be at least 1 and at most the 9 codes"):
        Engine(any_order_prior(), 2).submit(too_many)
    prior.config.trained_with_caption_dropout = False
    with pytest.raises(ValueError, match="needs a prior trained with caption dropout"):
        engine.submit(plain(0, 2.0))
    assert engine.num_waiting == 0
