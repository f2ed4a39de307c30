"""The application of a bundle: tokens of a file, and what each of several replicas does."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
from fastapi.testclient import TestClient

from pipeline.inference import batching
from pipeline.inference.batching import bytes_per_image
from pipeline.serving.build import build_app, read_tokens
from pipeline.serving.settings import ServerSettings
from stage2_prior import SamplingOptions
from tests.helpers.serving import client_of, serving_pipeline

URL = "/v1/images/generations"


def test_every_metric_of_a_replica_has_its_name(tmp_path):
    serving_pipeline().save_pretrained(tmp_path / "tiny")
    app = build_app(tmp_path / "tiny", ServerSettings(slots=2), replica="a1")
    with TestClient(app, "http://localhost") as client:
        client.post(URL, json={"prompt": "a red heart"})
        text = client.get("/metrics").text
    assert 'minidalle_images_total{replica="a1"} 1.0' in text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) > 30 and all(re.search(r'[{,]replica="a1"[,}]', one) for one in samples)


@pytest.mark.parametrize(
    ("folder", "name"), [("shapes/bundle", "shapes"), ("heart", "heart"), ("user/name", "name")]
)
def test_a_bundle_is_called_by_its_folder_or_its_run(tmp_path, monkeypatch, folder, name):
    serving_pipeline().save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path / folder)
    for given in (tmp_path / folder, "."):
        app = build_app(given, ServerSettings(slots=2))
        assert app.state.service.name == name
        app.state.service.close()


def test_there_are_as_many_slots_as_fit_the_memory(tmp_path, monkeypatch):
    pipe = serving_pipeline()
    pipe.save_pretrained(tmp_path / "tiny")
    one = bytes_per_image(pipe.prior, SamplingOptions(guidance_scale=2.0))
    for fitting, expected in ((3.2, 3), (100, 8)):
        free = int(fitting * one / batching.USABLE_MEMORY_FRACTION)
        monkeypatch.setattr(batching, "free_memory", lambda device, free=free: free)
        warned = pytest.warns(match="continuing with 3") if expected == 3 else nullcontext()
        with warned:
            app = build_app(tmp_path / "tiny", ServerSettings(slots=8))
        assert app.state.service.sampler.num_slots == expected
        app.state.service.close()
    monkeypatch.setattr(batching, "free_memory", lambda device: one // 2)
    with pytest.raises(MemoryError, match="one image of 16 codes does not fit"):
        build_app(tmp_path / "tiny", ServerSettings(slots=8))


def test_urls_are_refused_where_another_replica_may_be_asked_for_them():
    with client_of(refuse_urls=True) as client:
        body = {"prompt": "a red heart", "response_format": "url"}
        refused = client.post(URL, json=body)
        assert client.post(URL, json=body | {"response_format": "b64_json"}).status_code == 200
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "response_format"
    assert "ask for b64_json" in error["message"]


def test_a_file_of_another_owner_may_be_read_by_its_group(tmp_path, caplog, monkeypatch):
    """As secrets of containers are."""
    path = tmp_path / "tokens"
    path.write_text("one")
    path.chmod(0o440)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    assert read_tokens(path) == ["one"] and not caplog.text
    path.chmod(0o444)
    read_tokens(path)
    assert "others can read" in caplog.text


def test_tokens_of_a_file(tmp_path, caplog):
    path = tmp_path / "tokens"
    path.write_text("one\n\ntwo\n")
    path.chmod(0o600)
    assert read_tokens(path) == ["one", "two"] and not caplog.text
    path.chmod(0o644)
    read_tokens(path)
    assert f"others can read the tokens in {path}; run chmod 600" in caplog.text
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no token"):
        read_tokens(path)
    for text in ("secret\n\n# my laptop\n", "secret\n\nmy\tlaptop\n", "secret\n\n# für mich\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"line 3 of .* has a space; write one token per"):
            read_tokens(path)
    with pytest.raises(OSError, match=r"cannot be read .*; give a file with one token per line"):
        read_tokens(tmp_path)
    path.write_text("schlüssel")
    with pytest.raises(ValueError, match="beyond ASCII"):
        read_tokens(path)
    with pytest.raises(FileNotFoundError, match="there is no token file"):
        read_tokens(tmp_path / "none")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_token_file_of_another_encoding_is_refused_with_its_name(tmp_path, encoding):
    path = tmp_path / "tokens.txt"
    path.write_text("secret", encoding=encoding)
    with pytest.raises(ValueError, match=r"tokens\.txt is not UTF-8 text .*; save it as UTF-8"):
        read_tokens(path)


def test_a_token_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("secret", encoding="utf-8-sig")
    path.chmod(0o600)
    assert read_tokens(path) == ["secret"]
