"""Bundles and tokenizers of the Hub: what goes there comes back, nothing else travels, and every
refusal is one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.main import main
from pipeline.inference.hub import find_bundle, push_bundle
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.pipeline import TextToImagePipeline
from stage1_tokenizer import TokenizerModule
from tests.helpers.hub_server import StandIn, hub_on_this_machine
from tests.helpers.pipelines import tiny_icons_pipeline, tiny_latent_pipeline, tiny_pipeline
from tests.helpers.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"  # how huggingface_hub calls its HTTP client
)
NAME = "user/bundle"
PARTS = {
    *("pipeline.json", "tokenizer/config.json", "tokenizer/model.safetensors"),
    *("prior/config.json", "prior/model.safetensors", "text_tokenizer/tokenizer.json"),
    *("text_tokenizer/tokenizer_config.json", "text_tokenizer/text.json"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.chdir(tmp_path)
    with hub_on_this_machine(monkeypatch, tmp_path / "cache") as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "bundle"
    tiny_pipeline().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def pixels(pipe: TextToImagePipeline) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(["a red heart"], seed=3).images])


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_latent_pipeline])
def test_a_pushed_bundle_comes_back_and_samples_the_same_images(hub, make):
    pipe = make()
    address = pipe.push_to_hub(NAME, token=hub.token)
    assert address.startswith(f"{hub.address}/{NAME}/commit/")
    again = TextToImagePipeline.from_pretrained(NAME)
    assert type(again) is type(pipe)
    assert (pixels(again) == pixels(pipe)).all()


def test_only_models_cards_and_images_are_uploaded(hub, saved, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(saved, folder)
    others = ["notes.txt", "prior/optimizer.npz", ".env", "prior/log.jsonl"]
    for name in [*others, "README.md", "samples/grid.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("own")
    push_bundle(folder, NAME, token=hub.token)
    assert set(hub.files(NAME)) == {*PARTS, "README.md", "samples/grid.png", ".gitattributes"}


def test_a_bundle_that_is_pushed_over_another_leaves_nothing_of_it_that_is_read(
    hub, saved, tmp_path
):
    """Else its styles and names would be those of prompts."""
    known = tiny_icons_pipeline(KnownPrompts(("noto",), ("red heart",)))
    known.push_to_hub(NAME, token=hub.token)
    mine = {"notes.json": b"{}", "old.md": b"o", "prior/mine/x.json": b"{}"}
    own = mine | {"prior/old.json": b"{}"}
    hub.add(NAME, hub.files(NAME) | own)
    push_bundle(saved, NAME, token=hub.token)
    assert set(hub.files(NAME)) == {*PARTS, *mine, ".gitattributes", "README.md"}
    assert TextToImagePipeline.from_pretrained(NAME).known_prompts is None


def test_only_a_bundle_is_downloaded_of_a_repository_with_code(hub, saved):
    code = {"run.py": b"raise SystemExit", "prior/weights.pkl": b"c", "model.safetensors": b"big"}
    hub.add(NAME, {**contents(saved), **code, "README.md": b"card", "data/a.parquet": b"rows"})
    assert (pixels(TextToImagePipeline.from_pretrained(NAME)) == pixels(tiny_pipeline())).all()
    assert set(hub.served) == {*PARTS, "README.md"}


def test_a_link_to_a_file_outside_is_not_uploaded(hub, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "own")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "own" / "NOTES.md").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"NOTES\.md is a link to a file outside"):
        push_bundle(tmp_path / "own", NAME, token=hub.token)
    assert NAME not in hub.repos


def test_what_is_no_bundle_is_not_pushed(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="so it is no bundle"):
        push_bundle(tmp_path, NAME, token=hub.token)
    assert hub.requests == 0


def test_a_pushed_repository_is_private_where_that_is_asked_and_takes_a_token_to_read(hub, saved):
    push_bundle(saved, NAME, private=True, token=hub.token)
    with pytest.raises(FileNotFoundError, match="has no such repository, or shows it to its"):
        TextToImagePipeline.from_pretrained(NAME)
    assert TextToImagePipeline.from_pretrained(NAME, token=hub.token)


def test_a_revision_is_pushed_to_and_loaded(hub, saved):
    push_bundle(saved, NAME, token=hub.token)
    tiny_pipeline(likelihood="l1").push_to_hub(NAME, revision="other", token=hub.token)
    main_one = TextToImagePipeline.from_pretrained(NAME)
    other = TextToImagePipeline.from_pretrained(NAME, revision="other")
    assert main_one.tokenizer.own_config.likelihood != other.tokenizer.own_config.likelihood
    with pytest.raises(FileNotFoundError, match="it has no such revision; name a branch"):
        TextToImagePipeline.from_pretrained(NAME, revision="third")


def test_offline_the_cached_bundle_is_used_and_nothing_is_asked(hub, saved, monkeypatch):
    push_bundle(saved, NAME, token=hub.token)
    TextToImagePipeline.from_pretrained(NAME)
    before = hub.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (pixels(TextToImagePipeline.from_pretrained(NAME)) == pixels(tiny_pipeline())).all()
    for name, error in {"user/other": "neither here nor in", NAME: "is not pushed"}.items():
        with pytest.raises(OSError, match=rf"{error}.* --offline or HF_HUB_OFFLINE forbids"):
            if name == NAME:
                push_bundle(saved, name, token=hub.token)
            else:
                TextToImagePipeline.from_pretrained(name)
    assert hub.requests == before


def test_a_folder_of_that_spelling_is_never_looked_up(hub, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "user" / "bundle")
    TextToImagePipeline.from_pretrained(NAME)
    for name in ("user/bundel", "bundle", "./a/b", "a/b/c", "a--b/c", Path("some/bundle")):
        with pytest.raises(FileNotFoundError, match=r"give a folder that .* or user/name of the"):
            TextToImagePipeline.from_pretrained(name)
    assert hub.requests == 0


def test_a_changed_download_is_refused_by_its_repository(hub, saved):
    files = contents(saved)
    weights = bytearray(files["prior/model.safetensors"])
    weights[-1] ^= 1
    hub.add(NAME, files | {"prior/model.safetensors": bytes(weights)})
    with pytest.raises(ValueError, match=r"user/bundle of the Hub: .* was changed or damaged") as e:
        TextToImagePipeline.from_pretrained(NAME)
    cache = str(e.value).rpartition("remove ")[2]
    assert Path(cache).name == "models--user--bundle" and Path(cache).is_dir()
    shutil.rmtree(cache)
    hub.add(NAME, files)
    assert TextToImagePipeline.from_pretrained(NAME)


def test_a_download_that_breaks_off_is_an_error_and_no_bundle(hub, saved, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's trials
    hub.add(NAME, contents(saved))
    hub.breaks = "prior/model.safetensors"
    with pytest.raises(OSError, match=r"user/bundle is neither here.*broke off"):
        TextToImagePipeline.from_pretrained(NAME)
    hub.breaks = ""
    assert TextToImagePipeline.from_pretrained(NAME)


def test_a_repository_without_a_bundle_is_named(hub):
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": b"big"})
    with pytest.raises(FileNotFoundError, match=r"^user/bundle of the Hub: .*so it is no bundle"):
        TextToImagePipeline.from_pretrained(NAME)
    assert hub.served == []


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_wrong", r"refuses it to this token \(403\)"), (False, r"no such repository|\(401\)")],
)
def test_who_may_not_write_pushes_nothing(hub, saved, token, said):
    with pytest.raises(OSError, match=rf"^user/bundle is not pushed: .*({said})") as error:
        push_bundle(saved, NAME, token=token)
    assert "\n" not in str(error.value) and NAME not in hub.repos


def test_a_gated_repository_names_its_owner(hub, saved):
    hub.add(NAME, contents(saved))
    hub.gated.add(NAME)
    with pytest.raises(FileNotFoundError, match="its owner grants access to it"):
        TextToImagePipeline.from_pretrained(NAME)


@pytest.mark.parametrize("name", ["bundle", "a/b/c", "-a/b", "a/b c"])
def test_a_name_that_no_repository_can_have_is_refused_before_any_request(hub, saved, name):
    with pytest.raises(ValueError, match="is no name of a repository of the Hub; give user/name"):
        push_bundle(saved, name, token=hub.token)
    assert hub.requests == 0


def test_a_tokenizer_goes_to_the_hub_and_comes_back(hub):
    tokenizer = tiny_tokenizer()
    tokenizer.push_to_hub("user/tokenizer", token=hub.token)
    assert set(hub.files("user/tokenizer")) == {
        "config.json",
        "model.safetensors",
        ".gitattributes",
    }
    again = TokenizerModule.from_pretrained("user/tokenizer", revision="main")
    assert again.fingerprint == tokenizer.fingerprint


def test_commands_take_names_of_the_hub(hub, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["push", "--bundle", str(saved), "--to", NAME, "--private"]) == 0
    assert (
        NAME in hub.private and "minidalle generate --bundle user/bundle" in capsys.readouterr().out
    )
    image = ["a red heart", "--num-images", "1", "--out", str(tmp_path / "images")]
    assert main(["generate", "--bundle", NAME, *image]) == 0
    own = str(next((tmp_path / "images").glob("00000*.png")))
    assert main(["likelihood", own, "--bundle", NAME, "--prompt", "a red heart"]) == 0
    assert main(["generate", "--bundle", "user/none", *image]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("minidalle generate: user/none is neither here nor in the cache")


def test_a_bundle_of_the_package_is_pushed_by_its_name(hub, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    package = tmp_path / "package"  # the working directory is tmp_path
    monkeypatch.setattr("pipeline.config.shipped_bundles.FOLDER", package)
    shutil.copytree(saved, package / "icons")
    assert main(["push", "--bundle", "icons", "--to", "user/mine"]) == 0
    assert set(hub.files("user/mine")) == {*PARTS, "README.md", ".gitattributes"}


def test_a_bundle_of_the_cache_can_be_pushed_to_another_name(hub, saved):
    hub.add(NAME, contents(saved))
    push_bundle(find_bundle(NAME), "user/copy", token=hub.token)
    assert set(hub.files("user/copy")) == {*PARTS, "README.md", ".gitattributes"}
