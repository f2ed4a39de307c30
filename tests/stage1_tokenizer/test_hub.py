"""Names of the Hub: what is a path is never looked up, what was downloaded is checked, and nothing
waits for long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModel

from stage1_tokenizer import ImageTokenizer, hub
from stage1_tokenizer.hub import hub_answers, is_offline, model_folder
from tests.helpers.tokenizers import tiny_tokenizer

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with the tokenizer user/model; the folder of its files."""
    model = tmp_path / "models--user--model"
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_each_variable_forbids_the_network_whenever_it_is_set(monkeypatch, name):
    for other in hub._OFFLINE:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for value, offline in {"1": True, "yes": True, "": False, "0": False, "off": False}.items():
        monkeypatch.setenv(name, value)
        assert is_offline() is offline and constants.HF_HUB_OFFLINE is offline


def test_an_answer_that_does_not_come_is_not_waited_for(monkeypatch):
    class Silent:
        def repo_info(self, *names: object, **options: object) -> None:
            time.sleep(5)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "HfApi", Silent)
    monkeypatch.setattr(hub, "_SECONDS", 0.01)
    assert not hub_answers("user/model", "model")


def test_a_model_of_the_hub_is_loaded_from_its_cache(cache):
    loaded = ImageTokenizer.from_pretrained("user/model")
    assert loaded.fingerprint == tiny_tokenizer().fingerprint
    assert AutoModel.from_pretrained(cache).fingerprint == loaded.fingerprint
    with pytest.raises(ValueError, match="user/other is neither here nor in the cache"):
        ImageTokenizer.from_pretrained("user/other")


@pytest.mark.parametrize("options", [{}, {"revision": "main", "device_map": None}])
def test_a_model_of_the_hub_is_checked_before_it_is_read(cache, options):
    config = cache / "config.json"
    config.write_text(config.read_text().replace('"width": ', '"width": 4611686018427387904'))
    with pytest.raises(ValueError, match=r"\.width is about 2\^"):
        ImageTokenizer.from_pretrained("user/model", **options)
    (cache / "modeling.py").write_text("")
    with pytest.raises(ValueError, match=r"'modeling\.py', which may be code"):
        ImageTokenizer.from_pretrained("user/model", **options)


@pytest.mark.parametrize("name", ["./model", "a/b/c", "/model", "~/model", "models--user--model/x"])
def test_a_path_is_never_looked_up(cache, name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("was looked up"))
    with pytest.raises(FileNotFoundError, match="there is no"):
        model_folder(name, ["config.json"])
    assert model_folder(Path("user/model"), ["config.json"]) == Path("user/model")
