"""The sampling thread: its queue, cancelling, errors, and short memory."""

from __future__ import annotations

import asyncio
import shutil
import weakref

import pytest
import torch

from pipeline.inference import batching
from pipeline.serving.sampler import (
    Job,
    Preview,
    QueueFull,
    Sampled,
    Sampler,
    SamplingFailed,
    ShuttingDown,
)
from stage2_prior import CompiledSteps, Engine, SamplingOptions
from tests.helpers.serving import HeldStep, StepGate, client_of, serving_pipeline, wait_until


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


def test_a_full_queue_tells_how_long_its_codes_take(pipe, monkeypatch):
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=2, max_waiting=2)
        job = sampler.submit(plan(pipe, n=3))
        sampler._codes_per_second = 4.0  # images of 16 codes
        with pytest.raises(QueueFull, match="try again in 4 seconds"):
            sampler.submit(plan(pipe))  # one too many
        with pytest.raises(QueueFull, match="try again in 12 seconds") as full, sampler.room(3):
            pass
        gate.open.set()
        await all_of(job)
        assert sampler._codes_per_second != 4.0
        sampler.close()
        return full.value.retry_after

    assert asyncio.run(run()) == 12


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
        await asyncio.to_thread(wait_until, lambda: not sampler.num_pending)
        found = codes_of(await all_of(sampler.submit(plan(pipe, 4, n=2))))
        sampler.close()
        return found

    expected = pipe("a red heart", num_images_per_prompt=2, seed=4)
    assert asyncio.run(run()) == expected.codes.flatten(1).tolist()


def test_previews_hold_the_codes_so_far(pipe, monkeypatch):
    sixth = HeldStep(monkeypatch, 6)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=2)
        updates = []
        async for one in sampler.submit(plan(pipe), preview_every=4).updates():
            updates.append(one)
            sixth.released.set()
        sampler.close()
        return updates

    *previews, last = asyncio.run(run())
    assert previews
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


@pytest.mark.parametrize(("rows", "left"), [(8, 4), (3, 2)])
def test_short_memory_halves_the_rows_and_loses_nothing(pipe, monkeypatch, caplog, rows, left):
    failed = failing_once(monkeypatch, torch.OutOfMemoryError("no memory"))
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=rows)
        jobs = [sampler.submit(plan(pipe, seed, n=2)) for seed in range(3)]
        gate.open.set()
        found = await asyncio.gather(*map(all_of, jobs))
        await all_of(sampler.submit(plan(pipe)))  # after it was idle
        later = sampler._engine.num_rows
        sampler.close()
        return found, later

    found, later = asyncio.run(run())
    assert failed == [rows] and later == rows
    assert f"continuing with {left} rows" in caplog.text
    for seed, updates in enumerate(found):
        expected = pipe("a red heart", num_images_per_prompt=2, seed=seed)
        assert codes_of(updates) == expected.codes.flatten(1).tolist()


def test_where_no_engine_can_be_made_jobs_fail_and_the_sampler_says_that_it_ended(
    pipe, monkeypatch, caplog
):
    failing_once(monkeypatch, torch.OutOfMemoryError("no memory"))

    async def run():
        made = Sampler(pipe.prior, num_rows=8)

        def broken(*_, **__):
            raise RuntimeError("a device fault")

        monkeypatch.setattr("pipeline.serving.sampler.Engine", broken)
        with pytest.raises(ShuttingDown, match="cannot sample any more"):
            await all_of(made.submit(plan(pipe, n=4)))
        made._thread.join(60)
        assert made.has_failed and (made.num_slots, made.num_pending) == (0, 0)
        with pytest.raises(ShuttingDown, match="cannot sample any more"):
            made.submit(plan(pipe))

    asyncio.run(run())
    assert "the server cannot sample any more; start it again" in caplog.text


def test_a_server_that_cannot_sample_any_more_is_neither_healthy_nor_ready(pipe, monkeypatch):
    failing_once(monkeypatch, RuntimeError("a device fault"))
    with client_of(pipe, num_rows=8) as client:

        def broken(*_, **__):
            raise RuntimeError("a device fault")

        monkeypatch.setattr("pipeline.serving.sampler.Engine", broken)
        url, body = "/v1/images/generations", {"prompt": "a red heart"}
        failed = client.post(url, json=body | {"n": 4})
        later = client.post(url, json=body)
        states = [client.get(path) for path in ("/healthz", "/readyz")]
    assert (failed.status_code, later.status_code) == (500, 503)
    assert "start it again" in later.json()["error"]["message"]
    assert [(one.status_code, one.json()["status"]) for one in states] == [(503, "broken")] * 2


def test_an_engine_that_cannot_be_made_larger_again_ends_the_sampler(pipe, monkeypatch, caplog):
    """After memory was short, once nothing is sampled."""
    failing_once(monkeypatch, torch.OutOfMemoryError("no memory"))

    class Fits(Engine):
        def __init__(self, prior, num_rows, **options):
            if num_rows > 4:
                raise RuntimeError("a device fault")
            super().__init__(prior, num_rows, **options)

    async def run():
        made = Sampler(pipe.prior, num_rows=8)
        monkeypatch.setattr("pipeline.serving.sampler.Engine", Fits)
        done = codes_of(await all_of(made.submit(plan(pipe, n=4))))
        made._thread.join(60)
        assert made.has_failed
        return done

    found = asyncio.run(run())
    expected = pipe("a red heart", num_images_per_prompt=4, seed=0)
    assert found == expected.codes.flatten(1).tolist()
    assert "continuing with 4 rows" in caplog.text
    assert "the server cannot sample any more" in caplog.text


def test_a_table_that_did_not_fit_is_freed_before_the_next_one_is_made(pipe, monkeypatch):
    """Its error would keep it, which knows where it arose."""
    failing_once(monkeypatch, torch.OutOfMemoryError("no memory"))

    async def run():
        made = Sampler(pipe.prior, num_rows=8)
        first = weakref.ref(made._engine)
        freed = []

        class Watching(Engine):
            def __init__(self, prior, num_rows, **options):
                freed.append(first() is None)
                super().__init__(prior, num_rows, **options)

        monkeypatch.setattr("pipeline.serving.sampler.Engine", Watching)
        await all_of(made.submit(plan(pipe, n=4)))
        made.close()
        return freed

    freed = asyncio.run(run())
    assert freed and all(freed)


def test_an_error_of_a_step_fails_its_jobs_alone(pipe, monkeypatch, caplog):
    failing_once(monkeypatch, RuntimeError("broken"))
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=8)
        failed = [sampler.submit(plan(pipe, seed, n=2)) for seed in range(2)]
        gate.open.set()
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


@pytest.fixture(scope="module")
def any_order():
    return serving_pipeline(any_order=True)


def test_jobs_of_several_codes_per_step_share_the_table(any_order, monkeypatch):
    gate = StepGate(monkeypatch)
    sampled = []

    async def run():
        sampler = Sampler(
            any_order.prior, num_rows=8, on_step=lambda seconds, count: sampled.append(count)
        )
        plans = [
            plan(any_order, n=1),
            plan(any_order, n=2, num_inference_steps=4),
            plan(any_order, n=3, num_inference_steps=4),
        ]
        jobs = [sampler.submit(one) for one in plans]
        gate.open.set()
        found = [codes_of(await all_of(job)) for job in jobs]
        assert not sampler.num_active
        sampler.close()
        return found, plans

    found, plans = asyncio.run(run())
    assert found == [one.sample(any_order.prior).codes.tolist() for one in plans]
    assert sum(sampled) == 6 * any_order.prior.stream.image_length
    # The five images of both jobs take their four steps together, and one to verify the last codes.
    assert all(count == 1 for count in sampled[5:])


@pytest.fixture
def reported(monkeypatch):
    """All that the sampling thread reports; a job that is read late drops previews."""
    reports = []
    plain = Job.report

    def report(job, update):
        reports.append(update)
        plain(job, update)

    monkeypatch.setattr(Job, "report", report)
    return reports


def test_previews_have_codes_of_their_image(pipe, reported):
    async def run():
        sampler = Sampler(pipe.prior, num_rows=8)
        await all_of(sampler.submit(plan(pipe, n=3), preview_every=4))
        sampler.close()

    asyncio.run(run())
    done = codes_of(reported)
    previews = [one for one in reported if isinstance(one, Preview)]
    assert sorted((one.image, int(one.known.sum())) for one in previews) == [
        (image, count) for image in range(3) for count in (4, 8, 12)
    ]
    for one in previews:
        assert one.codes[one.known].tolist() == done[one.image][: int(one.known.sum())]


@pytest.mark.parametrize(("every", "count"), [(1, 3), (8, 1), (16, 0)])
def test_several_codes_per_step_have_previews_after_so_many_codes(
    any_order, reported, every, count
):
    async def run():
        sampler = Sampler(any_order.prior, num_rows=2)
        job = sampler.submit(plan(any_order, n=2, num_inference_steps=4), preview_every=every)
        await all_of(job)
        sampler.close()

    asyncio.run(run())
    previews = [one for one in reported if isinstance(one, Preview)]
    assert [one.image for one in previews] == [0, 1] * count
    known = [int(one.known.sum()) for one in previews]
    assert known == sorted(known) and all(number >= every for number in known)
    assert all(not one.codes[~one.known].any() for one in previews)


def test_a_cancelled_job_of_several_codes_per_step_leaves_at_once(any_order, monkeypatch):
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(any_order.prior, num_rows=2, max_waiting=1)
        running = sampler.submit(plan(any_order))  # its step waits for the gate
        cancelled = sampler.submit(plan(any_order, seed=1, num_inference_steps=4))
        sampler.cancel(cancelled)
        gate.open.set()
        await all_of(running)
        after = codes_of(await all_of(sampler.submit(plan(any_order, 2, num_inference_steps=2))))
        assert not sampler.num_pending
        sampler.close()
        return after

    assert (
        asyncio.run(run())
        == plan(any_order, 2, num_inference_steps=2).sample(any_order.prior).codes.tolist()
    )


def test_closing_ends_jobs_of_several_codes_per_step(any_order, monkeypatch):
    gate = StepGate(monkeypatch)

    async def run():
        sampler = Sampler(any_order.prior, num_rows=2)
        running = sampler.submit(plan(any_order))
        waiting = sampler.submit(plan(any_order, num_inference_steps=4))
        sampler.stop()
        gate.open.set()
        for job in (running, waiting):
            with pytest.raises(ShuttingDown):
                await all_of(job)
        sampler.close()

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_steps_of_one_image_sample_the_same_codes(pipe, caplog):
    caplog.set_level("INFO", "pipeline.serving")
    options = SamplingOptions(guidance_scale=2.0)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=4, compiled=True, options=options)
        assert "compiled the steps of one image in" in caplog.text
        jobs = [sampler.submit(plan(pipe, seed, guidance_scale=2.0)) for seed in range(3)]
        found = [codes_of(await all_of(job)) for job in jobs]
        sampler.close()
        return found

    expected = [plan(pipe, seed, guidance_scale=2.0).sample(pipe.prior) for seed in range(3)]
    assert asyncio.run(run()) == [one.codes.tolist() for one in expected]


def test_where_the_compiler_fails_plain_steps_are_taken(pipe, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("g++ ended with 1")

    monkeypatch.setattr(CompiledSteps, "compile", fail)

    async def run():
        sampler = Sampler(pipe.prior, num_rows=2, compiled=True)
        found = codes_of(await all_of(sampler.submit(plan(pipe, seed=4))))
        sampler.close()
        return found

    monkeypatch.setattr(batching, "can_compile", lambda device: True)
    assert asyncio.run(run()) == plan(pipe, seed=4).sample(pipe.prior).codes.tolist()
    assert "compiling failed (g++ ended with 1), and continues without" in caplog.text


def test_compiled_steps_need_a_compiler(pipe, monkeypatch):
    monkeypatch.setattr(batching, "can_compile", lambda device: False)
    with pytest.raises(ValueError, match="install them"):
        Sampler(pipe.prior, num_rows=2, compiled=True)


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
