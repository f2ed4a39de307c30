"""Requests that schemathesis makes from the OpenAPI schema: none fails the server, and responses
are as described."""

from __future__ import annotations

import base64

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.helpers.serving import png_of, running, tiny_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
"""Statuses are 2xx and 4xx: no 5xx but that of `/readyz` is allowed."""
FILES = ("/v1/images/edits", "/v1/images/variations")
BODIES = ("/v1/images/generations", "/v1/score", "/v1/captions", "/v1/tokens")
NAMES = ("/v1/models/{name}", "/v1/files/{name}")
PLAIN = ("/healthz", "/readyz", "/metrics", "/v1/models")
KINDS = [
    *((path, "POST", mode, 40) for path in FILES + BODIES for mode in GenerationMode),
    *((path, "GET", GenerationMode.POSITIVE, 8) for path in NAMES),  # every name is a valid one
]
"""Paths, valid or invalid requests, and how many: 496, besides one to each of `PLAIN`."""


@pytest.fixture(scope="module")
def address(pipe):
    with running(tiny_app(pipe)) as address:
        yield address


@pytest.fixture(scope="module")
def schema(address):
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.fixture(scope="module")
def image(pipe):
    return png_of(pipe("a blue star", seed=1).images[0])


@pytest.mark.parametrize(("path", "method", "mode", "count"), KINDS)
def test_requests_of_the_schema_get_what_it_describes(
    schema, address, image, path, method, mode, count
):
    operation = schema[path][method]
    in_json = base64.b64encode(image).decode()

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def check(case, is_image):
        if is_image and isinstance(case.body, dict) and case.body.get("image"):
            # Without one, no request would come further than to its image.
            case.body["image"] = image if path in FILES else in_json
        case.call_and_validate(base_url=address, checks=CHECKS)

    check()


@pytest.mark.parametrize("path", PLAIN)
def test_requests_without_parameters_get_what_is_described(schema, address, path):
    schema[path]["GET"].Case().call_and_validate(base_url=address, checks=CHECKS)
