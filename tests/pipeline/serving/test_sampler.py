"""The sampling thread: its queue, cancelling, errors, and short memory."""

from __future__ import annotations

import asyncio

import pytest
import torch

from pipeline.serving.sampler import (
    Preview,
    QueueFull,
    Sampled,
    Sampler,
    SamplingFailed,
    ShuttingDown,
)
from stage2_prior import Engine
from tests.helpers.serving import StepGate, serving_pipeline


@pytest.fixture(scope="module")
def pipe():
    return serving_pipeline()


def plan(pipe, seed=0, n=1, **options):
    return pipe.plan(["a red heart"], num_images=n, seed=seed, **options)


async def all_of(job):
    return [one async for one in job.updates()]


def codes_of(updates):
    done = {one.image: one.samples.codes[0].tolist() for one in updates if isinstance(one, Sampled)}
    return [done[i] for i in range(len(done))]


def test_a_full_queue_refuses_and_says_when_to_come_again(pipe, monkeypatch):
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=2, max_waiting=2)
        jobs = [sampler.submit(plan(pipe, seed)) for seed in range(3)]
        with pytest.raises(QueueFull, match="try again in 1 seconds") as full:
            sampler.submit(plan(pipe))
        assert full.value.retry_after == 1
        gate.open.set()
        for job in jobs:
            await all_of(job)
        await all_of(sampler.submit(plan(pipe)))  # there is room again
        sampler.close()

    asyncio.run(run())


def test_first_come_first_served(pipe):
    async def run():
        sampler = Sampler(pipe.prior, num_rows=2)
        ended = []

        async def wait(job, number):
            await all_of(job)
            ended.append(number)

        jobs = [sampler.submit(plan(pipe, seed, guidance_scale=2.0)) for seed in range(6)]
        await asyncio.gather(*(wait(job, number) for number, job in enumerate(jobs)))
        sampler.close()
        return ended

    assert asyncio.run(run()) == list(range(6))


def test_a_cancelled_job_frees_its_place(pipe, monkeypatch):
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=2, max_waiting=1)
        first = sampler.submit(plan(pipe, n=2))
        sampler.cancel(first)
        gate.open.set()
        while sampler.num_pending:
            await asyncio.sleep(0.01)
        found = codes_of(await all_of(sampler.submit(plan(pipe, 4, n=2))))
        sampler.close()
        return found

    expected = pipe("a red heart", num_images_per_prompt=2, seed=4)
    assert asyncio.run(run()) == expected.codes.flatten(1).tolist()


def test_previews_hold_the_codes_so_far(pipe):
    async def run():
        sampler = Sampler(pipe.prior, num_rows=2)
        updates = await all_of(sampler.submit(plan(pipe), preview_every=4))
        sampler.close()
        return updates

    *previews, last = asyncio.run(run())
    for one in previews:
        assert isinstance(one, Preview)
        count = int(one.known.sum())
        assert count in (4, 8, 12)
        assert one.codes[:count].tolist() == last.samples.codes[0, :count].tolist()


def failing_once(monkeypatch, error):
    plain = Engine.step
    failed = []

    def step(engine):
        if not failed and engine.num_waiting + engine.num_active >= 3:
            failed.append(engine.num_rows)
            plain(engine)  # some codes are there already
            raise error
        return plain(engine)

    monkeypatch.setattr(Engine, "step", step)
    return failed


def test_short_memory_halves_the_rows_and_loses_nothing(pipe, monkeypatch, caplog):
    failed = failing_once(monkeypatch, torch.OutOfMemoryError("no memory"))

    async def run():
        sampler = Sampler(pipe.prior, num_rows=8)
        found = await asyncio.gather(
            *(all_of(sampler.submit(plan(pipe, seed, n=2))) for seed in range(3))
        )
        rows = sampler._engine.num_rows
        sampler.close()
        return found, rows

    found, rows = asyncio.run(run())
    assert failed == [8] and rows == 4
    assert "continuing with 4 rows" in caplog.text
    for seed, updates in enumerate(found):
        expected = pipe("a red heart", num_images_per_prompt=2, seed=seed)
        assert codes_of(updates) == expected.codes.flatten(1).tolist()


def test_an_error_of_a_step_fails_its_jobs_alone(pipe, monkeypatch, caplog):
    failing_once(monkeypatch, RuntimeError("broken"))

    async def run():
        sampler = Sampler(pipe.prior, num_rows=8)
        failed = [sampler.submit(plan(pipe, seed, n=2)) for seed in range(2)]
        for job in failed:
            with pytest.raises(SamplingFailed, match="see the server's log") as failure:
                await all_of(job)
            assert str(failure.value.__cause__) == "broken"
        assert sampler.num_pending == 0
        found = codes_of(await all_of(sampler.submit(plan(pipe, 9))))
        sampler.close()
        return found

    assert asyncio.run(run()) == pipe("a red heart", seed=9).codes.flatten(1).tolist()
    assert "broken" in caplog.text


def test_a_plan_that_was_not_checked_fails_with_its_cause(pipe):
    async def run():
        sampler = Sampler(pipe.prior, num_rows=2)
        with pytest.raises(SamplingFailed, match="see the server's log") as failure:
            await all_of(sampler.submit(plan(pipe, num_inference_steps=3)))
        assert "random" in str(failure.value.__cause__)
        sampler.close()

    asyncio.run(run())


def test_closing_ends_what_is_left(pipe, monkeypatch):
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=2)
        jobs = [sampler.submit(plan(pipe, seed)) for seed in range(3)]
        sampler.stop()
        with pytest.raises(ShuttingDown):
            sampler.submit(plan(pipe))
        gate.open.set()
        for job in jobs:
            with pytest.raises(ShuttingDown, match="send the request to another one"):
                await all_of(job)
        sampler.close()

    asyncio.run(run())
