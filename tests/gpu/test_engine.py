"""Requests that join a running table on a GPU: compiled steps, captured as graphs."""

from __future__ import annotations

import pytest
import torch

from stage2_prior import Engine, SampleRequest, SamplingOptions, sample
from stage2_prior.compilation import CompiledAtFirstUse
from tests.helpers.priors import any_order_prior

pytestmark = pytest.mark.gpu
CAPTIONS = torch.tensor([[0, 3, 4, 1, 2, 2], [0, 5, 1, 2, 2, 2]])


def test_requests_that_join_captured_steps_get_the_codes_of_sample(device):
    """Images join between the replays of a graph, move to other rows when one is cancelled, and
    lose the row of their null caption outside the guidance interval."""
    prior = any_order_prior().to(device)
    options = SamplingOptions(guidance_scale=2.0, guidance_interval=(0.0, 0.7), top_k=5)
    with torch.inference_mode():
        engine = Engine(prior, 4, steps=CompiledAtFirstUse(prior))
    requests = {}
    finished = []
    for seed in range(7):
        request = SampleRequest(text_ids=CAPTIONS[seed % 2], seed=seed, options=options)
        requests[engine.submit(request)] = request
        finished += engine.step()
        if seed == 3:
            assert engine.cancel(engine.submit(request))  # waits
            assert engine.cancel(next(iter(engine.progress)))  # is sampled
    while engine.num_active or engine.num_waiting:
        finished += engine.step()
    assert len(finished) == 6
    for one in finished:
        request = requests[one.ticket]
        expected = sample(prior, request.text_ids[None], [request.seed], options)
        assert one.samples is not None
        assert torch.equal(one.samples.codes, expected.codes)
        torch.testing.assert_close(
            one.samples.log_likelihood, expected.log_likelihood, rtol=1e-4, atol=1e-4
        )
    if device.type == "cuda":
        assert any(engine._table._graphs.values())
