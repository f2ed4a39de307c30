"""deploy/ray_serve.py: its arguments, and two replicas on this machine behind one address."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from pipeline.cli.serve import serve_command
from pipeline.serving.settings import ServerSettings
from tests.helpers.ray_cluster import ray_serve
from tests.helpers.serving import events_of, serving_pipeline

pytest.importorskip("ray.serve", reason="needs the extra ray")

from ray import serve

from deploy.ray_serve import Arguments, app

ROOT = Path(__file__).parents[2]
HEART = {"prompt": "a red heart", "n": 2, "seed": 7}


def test_ray_finds_the_class_of_the_arguments():
    """It converts what the command line gives only where the annotation is a class."""
    (parameter,) = inspect.signature(app).parameters.values()
    assert parameter.annotation is Arguments
    given = Arguments.model_validate({"slots": "4", "max_replicas": "2", "log_prompts": "true"})
    assert (given.slots, given.max_replicas, given.log_prompts) == (4, 2, True)


def test_arguments_are_the_options_of_serve():
    options = inspect.signature(serve_command).parameters
    shared = options.keys() - {"port", "refuse_urls"}  # Ray's, and what follows from the replicas
    assert shared <= Arguments.model_fields.keys()
    defaults = {name: options[name].default for name in shared - {"bundle"}}
    assert {name: getattr(Arguments(), name) for name in defaults} == defaults
    assert Arguments().bundle == "icons"


def test_every_argument_reaches_the_replica():
    given = Arguments(
        host="127.0.0.2",
        public_host="draw.example.org",
        slots=4,
        max_waiting=5,
        max_images=6,
        max_prompt=7,
        max_body_mb=8,
        timeout=9,
        grace=10,
        log_prompts=True,
        compile=True,
        max_replicas=2,
    )
    settings = vars(given.settings())
    assert settings.pop("compiled") and settings.pop("refuse_urls") and settings.pop("port")
    assert settings == {name: getattr(given, name) for name in settings}
    assert not Arguments().settings().refuse_urls
    assert Arguments().settings().slots == ServerSettings.slots


def test_the_number_of_replicas_follows_the_load_and_each_has_its_cores_and_gpus(monkeypatch):
    given = Arguments(min_replicas=1, max_replicas=3, target_requests=5, cpus=2, gpus=1, slots=4)
    asked = []
    plain = serve.deployment
    monkeypatch.setattr(
        serve, "deployment", lambda **options: asked.append(options) or plain(**options)
    )
    app(given)
    app(Arguments(slots=4))
    scaling = asked[0]["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.target_ongoing_requests == 5
    assert asked[0]["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1}
    assert asked[1]["autoscaling_config"].target_ongoing_requests == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicas": 2}, "Extra inputs"),
        ({"min_replicas": 0}, "greater than or equal to 1"),
        ({"min_replicas": 2}, "max_replicas"),
        ({"slots": 65}, "from 1 to 64"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        app(Arguments(**change))


def test_the_configuration_is_of_this_application():
    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    (one,) = config["applications"]
    assert one["import_path"] == "deploy.ray_serve:app"
    assert Arguments(**one["args"]).host == config["http_options"]["host"] == "127.0.0.1"


def ask(server, **change):
    return server.client.post("/v1/images/generations", json=HEART | change)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_replicas(tmp_path):
    pipe = serving_pipeline()
    pipe.save_pretrained(tmp_path / "tiny")
    bundle = str(tmp_path / "tiny")
    with (
        ray_serve(tmp_path, bundle=bundle, min_replicas=2, max_replicas=2, cpus=0.5) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        before = server.wait_for_replicas(2)

        # Each replica returns images, and the same ones.
        for _ in range(10):
            answers = list(pool.map(lambda _: ask(server), range(8)))
            assert {one.status_code for one in answers} == {200}
            images = {tuple(data["b64_json"] for data in one.json()["data"]) for one in answers}
            codes = {str([data["codes"] for data in one.json()["data"]]) for one in answers}
            assert len(images) == len(codes) == 1
            if all(server.replicas().values()):
                break
        assert len(before) == 2 and all(server.replicas().values())
        expected = pipe(HEART["prompt"], num_images_per_prompt=2, seed=7).codes.flatten(1)
        assert codes == {str(expected.tolist())}

        # The API is that of one server.
        streamed = events_of(ask(server, stream=True, partial_images=2).text)
        assert [name for name, _ in streamed][-1] == "image_generation.completed"
        refused = ask(server, response_format="url")
        assert refused.status_code == 400 and "ask for b64_json" in refused.text
        other = server.client.get("/v1/models", headers={"host": "other.example"})
        assert other.status_code == 400

        # A replica that is killed is replaced, and others answer meanwhile.
        server.processes()[0].kill()
        assert [ask(server).status_code for _ in range(8)] == [200] * 8
        after = server.wait_for_replicas(1, besides=before)
        assert len(after.keys() & before.keys()) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_replica_is_added_where_more_requests_run_than_one_is_to_have(tmp_path):
    serving_pipeline().save_pretrained(tmp_path / "tiny")
    found = threading.Event()

    def keep_asking(server):
        statuses = set()
        while not found.is_set():
            statuses.add(ask(server).status_code)
        return statuses

    limits = {"min_replicas": 1, "max_replicas": 2, "target_requests": 1, "cpus": 0.5}
    with (
        ray_serve(tmp_path, bundle=str(tmp_path / "tiny"), **limits) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        try:
            assert len(server.wait_for_replicas(1)) == 1
            asking = [pool.submit(keep_asking, server) for _ in range(6)]
            assert len(server.wait_for_replicas(2)) == 2
        finally:
            found.set()
        assert set().union(*(one.result() for one in asking)) == {200}
