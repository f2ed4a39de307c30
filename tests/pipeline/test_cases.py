"""Inputs as people have them: each is read as its owner means it, from the file to the image and
its caption, or to the result of a command.

| input | test, next to these |
|---|---|
| captions far longer than the text slots | `stages/test_preflight.py` |
| .tsv, a delimiter, `captions.txt` | `data/readers/test_tables.py` |
| a clone of a data set of the Hub, streamed | `data/readers/test_splits.py` |
| codes of a resumed run whose data moved | `stages/test_manifest.py` |
"""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.data.load import load_sources
from tests.helpers.cli import fails
from tests.helpers.data import config, encoded

NUMBERS = range(6)
ALL = {20 * i: [f"shade {i}"] for i in NUMBERS}
"""Red of each image -> its captions."""


def image(i: int, form: str = "PNG") -> bytes:
    return encoded((20 * i, 0, 0), (32, 32), form)


def write(folder: Path, names: str = "{}.png", first: int = 0, last: int = 5) -> Path:
    """The images as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, last + 1):
        (folder / names.format(i)).write_bytes(image(i))
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path.parent


def read(source: Path, **options: object) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Red of each image -> its captions: of the images to train on, and of those held out."""
    found = []
    for split in load_sources(config(source, **options)):
        rows = range(len(split))
        shades = split.images(rows)[:, 0, 0, 0].tolist() if rows else []
        found.append(
            {
                20 * round(shade / 20): split.all_captions([row])[0]
                for row, shade in enumerate(shades)
            }
        )
    return found[0], found[1]


def read_all(source: Path, **options: object) -> dict[int, list[str]]:
    train, held_out = read(source, **options)
    assert not set(train) & set(held_out)
    return dict(sorted((train | held_out).items()))


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_shard_with_its_images_first_and_its_captions_after_them(tmp_path):
    members = [(f"./{i:06}.png", image(i)) for i in NUMBERS]
    members += [(f"./{i:06}.txt", f"shade {i}".encode()) for i in NUMBERS]
    assert read_all(write_tar(tmp_path / "shards/0.tar", members)) == ALL


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_of_named_parts(tmp_path, streaming):
    members = []
    for i in NUMBERS:
        members.append((f"sample{i}.input.png", image(i)))
        members.append((f"sample{i}.outputs.txt", f"shade {i}".encode()))
    folder = write_tar(tmp_path / "shards/0.tar", members)
    if not streaming:
        assert read_all(folder) == ALL
        return
    _, held_out = load_sources(config(folder, streaming=True, val_fraction=0.9))
    rows = range(len(held_out))
    of_images = {
        int(pixels[0, 0, 0]): c
        for pixels, c in zip(held_out.images(rows), held_out.all_captions(rows), strict=True)
    }
    assert of_images and of_images.items() <= ALL.items()


def test_caption_files_of_kohya(tmp_path):
    for folder, ending, first, last in (("10_toys", "caption", 0, 3), ("2_more", "txt", 4, 5)):
        write(tmp_path / folder, first=first, last=last)
        for i in range(first, last + 1):
            (tmp_path / folder / f"{i}.{ending}").write_text(f"shade {i}\n")
    assert read_all(tmp_path) == ALL


def test_a_caption_that_is_wrapped(tmp_path):
    write(tmp_path)
    for i in NUMBERS:
        (tmp_path / f"{i}.txt").write_text(f"The image shows\nshade {i}.\n\nIt is calm.\n")
    joined = {20 * i: [f"The image shows shade {i}. It is calm."] for i in NUMBERS}
    assert read_all(tmp_path, caption_lines="joined") == joined


@pytest.mark.parametrize("held_out", ["test", "valid", "validation", "val"])
def test_a_folder_for_each_split(tmp_path, held_out):
    for folder, first, last in (("train", 0, 3), (held_out, 4, 5)):
        rows = range(first, last + 1)
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"shade {i}"}) for i in rows]
        (write(tmp_path / folder, first=first, last=last) / "metadata.jsonl").write_text(
            "\n".join(lines)
        )
    train, other = read(tmp_path)
    assert (sorted(train), sorted(other)) == ([0, 20, 40, 60], [80, 100])
    assert train | other == ALL


def test_a_clone_of_a_data_set_of_the_hub(tmp_path):
    data = tmp_path / "clone" / "data"
    data.mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("---\n---\n")
    files = {"train-00000-of-00002": (0, 1), "train-00001-of-00002": (2, 3), "test-00000": (4, 5)}
    for name, rows in files.items():
        cells = [{"bytes": image(i), "path": f"{i}.png"} for i in rows]
        table = pa.table({"image": cells, "text": [f"shade {i}" for i in rows]})
        pq.write_table(table, data / f"{name}.parquet")
    train, held_out = read(tmp_path / "clone")
    assert (sorted(train), sorted(held_out)) == ([0, 20, 40, 60], [80, 100])
    assert train | held_out == ALL


@pytest.mark.parametrize("kind", ["coco", "rows", "llava"])
def test_captions_in_one_json_file(tmp_path, kind):
    write(tmp_path / "val2017")
    names = [f"val2017/{i}.png" for i in NUMBERS]
    texts = [f"shade {i}" for i in NUMBERS]
    content: object = [{"image": n, "caption": t} for n, t in zip(names, texts, strict=True)]
    if kind == "coco":
        images = [{"id": 1000 + i, "file_name": f"{i}.png"} for i in NUMBERS]
        notes = [{"id": i, "image_id": 1000 + i, "caption": texts[i]} for i in NUMBERS]
        content = {"info": {}, "images": images, "annotations": notes}
    if kind == "llava":
        asked = {"from": "human", "value": "<image>\nDescribe it."}
        content = [
            {"image": n, "conversations": [asked, {"from": "gpt", "value": t}]}
            for n, t in zip(names, texts, strict=True)
        ]
    (tmp_path / "captions_val2017.json").write_text(json.dumps(content))
    assert read_all(tmp_path / "captions_val2017.json") == ALL


@pytest.mark.parametrize("name", ["list.csv", "metadata.csv", "list.jsonl", "list.parquet"])
def test_a_table_written_on_windows(tmp_path, name):
    write(tmp_path / "my images")
    names = [f"my images\\{i}.png" for i in NUMBERS]
    texts = [f"shade {i}" for i in NUMBERS]
    rows = [{"file_name": n, "text": t} for n, t in zip(names, texts, strict=True)]
    if name.endswith(".csv"):
        lines = ["\ufefffile_name,text", *(f"{n},{t}" for n, t in zip(names, texts, strict=True))]
        (tmp_path / name).write_bytes("\r\n".join(lines).encode())
    elif name.endswith(".jsonl"):
        (tmp_path / name).write_text("\r\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    source = tmp_path if name == "metadata.csv" else tmp_path / name
    assert read_all(source, image_column="file_name") == ALL


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (unicodedata.normalize("NFD", "gr\u00fcn-{}.png"), "gr\u00fcn-{}.png"),
        ("gr\u00fcn-{}.png", unicodedata.normalize("NFD", "gr\u00fcn-{}.png")),
        ("DSC_{}.PNG", "dsc_{}.png"),
    ],
)
@pytest.mark.parametrize("table", ["metadata.csv", "list.csv"])
def test_names_in_another_form_or_case(tmp_path, there, named, table):
    write(tmp_path, there)
    lines = ["file_name,text", *(f"{named.format(i)},shade {i}" for i in NUMBERS)]
    (tmp_path / table).write_text("\n".join(lines))
    source = tmp_path if table == "metadata.csv" else tmp_path / table
    assert read_all(source) == ALL


@pytest.mark.parametrize("most", [4095, 3000, 65535])
def test_grey_images_of_more_than_8_bits(tmp_path, most):
    """Half of the largest value of its range is shown as middle grey."""
    white = 65535 if most == 65535 else 4095
    for i in NUMBERS:
        values = np.full((20, 20), white // 2, np.uint16)
        values[10:] = most
        Image.fromarray(values).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"shade {i}")
    for split in load_sources(config(tmp_path)):
        images = split.images(range(len(split)))
        assert (abs(images[:, 0, 0].astype(int) - 127) <= 1).all()


@pytest.mark.parametrize("cell", [float("nan"), "nan", None, "None", "", "  ", [], "[]", "[None]"])
def test_rows_without_a_caption_are_left_out(tmp_path, cell):
    write(tmp_path)
    texts = [cell if i % 2 else f"shade {i}" for i in NUMBERS]
    lines = [json.dumps({"image": f"{i}.png", "text": texts[i]}) for i in NUMBERS]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    found = read_all(tmp_path / "list.jsonl", val_fraction=0.5)
    assert found == {20 * i: [f"shade {i}"] for i in NUMBERS if i % 2 == 0}


def test_lists_of_captions_that_were_written_as_texts(tmp_path):
    write(tmp_path)
    rows = [(f"{i}.png", repr([f"shade {i}", f"it's {i}"])) for i in NUMBERS]
    quoted = ['{},"{}"'.format(name, text.replace('"', '""')) for name, text in rows]
    (tmp_path / "list.csv").write_text("\n".join(["image,text", *quoted]))
    both = {20 * i: [f"shade {i}", f"it's {i}"] for i in NUMBERS}
    assert read_all(tmp_path / "list.csv") == both


@pytest.mark.slow
def test_prompts_of_notepad_give_the_images_of_the_same_prompts(finished_run, tmp_path, capsys):
    bundle = str(finished_run[1] / "bundle")
    prompts = ["a red circle", "a blue star"]
    lines = [prompts[0], "", prompts[1], "  ", ""]
    (tmp_path / "utf8.txt").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    (tmp_path / "utf16.txt").write_bytes("\r\n".join(lines).encode("utf-16"))
    (tmp_path / "latin.txt").write_bytes("a caf\u00e9\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    command = ["generate", "--bundle", bundle, "--out"]
    assert main([*command, str(tmp_path / "given"), *prompts]) == 0
    given = (tmp_path / "given" / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in given.splitlines()]
    for name in ("utf8", "utf16"):
        file = str(tmp_path / f"{name}.txt")
        assert main([*command, str(tmp_path / name), "--prompts", file]) == 0
        assert (tmp_path / name / "samples.jsonl").read_text() == given
        for row in rows:
            of_file = (tmp_path / name / row["file"]).read_bytes()
            assert of_file == (tmp_path / "given" / row["file"]).read_bytes()
    for name, message in (("latin", "latin.txt is not UTF-8 (line 1"), ("empty", "empty.txt")):
        fails(capsys, [*command, tmp_path / name, "--prompts", tmp_path / f"{name}.txt"], message)


@pytest.mark.slow
def test_training_resumes_after_its_images_moved(tiny_yaml, tmp_path, capsys):
    for i in range(12):
        write(tmp_path / "here", first=i, last=i)
        (tmp_path / "here" / f"{i}.txt").write_text(f"shade {i}")
    command = ["train-tokenizer", "--config", str(tiny_yaml), "--data.val_fraction", "0.3"]
    assert main([*command, "--data.source", str(tmp_path / "here")]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    moved = [*command, "--data.source", f"{tmp_path / 'there'}/", "--tokenizer.train.steps", "8"]
    assert main(moved) == 0
    said = capsys.readouterr()
    assert "resuming from" in said.out + said.err
    (tmp_path / "there" / "0.png").write_bytes(image(40))
    fails(capsys, moved, "(images)")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_exported_codes_are_joined_with_ones_own_table_by_name(
    finished_run, tmp_path, form, capsys
):
    """Beside images that are broken, small or without a caption, and of equal names in two
    folders; across splits and shards."""
    from stage1_tokenizer import TokenizerModule

    folder = tmp_path / "own"
    for i in range(24):
        size = 20 if i % 5 == 4 else 32
        path = folder / "ab"[i % 2] / f"{i // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if i == 7 else encoded((10 * i, 0, 0), (size, size)))
        if i % 3:
            path.with_suffix(".txt").write_text(f"shade {i}")
    options = ["--data.val_fraction", "0.3", "--encode.images_per_shard", "5"]
    options += ["--data.filter.max_corrupt_fraction", "0.1", "--data.source", str(folder)]
    tokenizer = finished_run[1] / "tokenizer"
    command = ["encode", "--tokenizer", str(tokenizer), "--format", form, *options]
    assert main([*command, "--out", str(tmp_path / "codes")]) == 0
    found = _codes_by_name(tmp_path / "codes", form)
    whole = [i for i in range(24) if i % 5 != 4 and i != 7]
    assert sorted(found) == sorted(f"{'ab'[i % 2]}/{i // 2}.png" for i in whole)
    names = sorted(found)
    images = [Image.open(folder / name) for name in names]
    codes = TokenizerModule.from_pretrained(tokenizer).to_codes(images).flatten(1).numpy()
    same = np.stack([found[name].ravel() for name in names]) == codes
    assert same.mean() > 0.8  # bf16 may turn a near tie
    said = capsys.readouterr()
    for what in ("1 unreadable images left out: b/3.png", "smaller than 32 pixels left out"):
        assert what in said.out + said.err


def _codes_by_name(folder: Path, form: str) -> dict[str, np.ndarray]:
    """Codes by the names of the images, over all files of an export."""
    found: dict[str, np.ndarray] = {}
    if form == "parquet":
        for file in sorted(folder.glob("*.parquet")):
            table = pq.read_table(file).to_pydict()
            for name, codes in zip(table["name"], table["codes"], strict=True):
                assert name not in found
                found[name] = np.array(codes)
        return found
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for member, content in members.items():
            if member.endswith(".json"):
                name = json.loads(content)["name"]
                assert name not in found
                codes = members[member.removesuffix("json") + "codes.npy"]
                found[name] = np.load(io.BytesIO(codes), allow_pickle=False)
    return found
