"""The application of a bundle: tokens of a file, and what each of several replicas does."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from pipeline.serving.build import build_app, read_tokens
from pipeline.serving.settings import ServerSettings
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
    path.write_text("schlüssel")
    with pytest.raises(ValueError, match="beyond ASCII"):
        read_tokens(path)
    with pytest.raises(FileNotFoundError, match="there is no token file"):
        read_tokens(tmp_path / "none")
