"""`minidalle codebook`: images of every code, sorted by use, and a self-contained HTML page."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli.main import main
from pipeline.evaluation import codebook_report
from pipeline.evaluation.codebook_report import METRICS, codebook_page
from pipeline.runtime.image_grid import bars
from stage1_tokenizer import (
    TokenizerModule,
    count_codes,
    distinct_codes,
    reencoding_metrics,
    to_model_range,
    to_uint8,
)
from stage1_tokenizer.code_views import gumbel_views, naive_views
from tests.helpers.cli import fails
from tests.helpers.tokenizers import KINDS, tiny_tokenizer


def images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_codes_are_sorted_by_use_and_shown_decoded(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (view,) = codebook_page(tmp_path / "tokenizer", images(), tmp_path / "page")
    codes = tokenizer.encode(to_model_range(torch.from_numpy(images())))
    counts = torch.bincount(codes.flatten(), minlength=12)
    assert sorted(view.codes) == list(range(12)) and view.counts == sorted(
        counts.tolist(), reverse=True
    )
    assert [int(counts[code]) for code in view.codes] == view.counts
    first = to_uint8(tokenizer.decode(torch.full((1, 4, 4), view.codes[0])))[0, 8:12, 8:12].numpy()
    assert np.array_equal(view.images["alone"][1:5, 1:5], first)
    assert view.statistics.dead == int((counts == 0).sum())


def test_context_shows_where_the_code_occurs(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (view,) = codebook_page(tmp_path / "tokenizer", images(), tmp_path / "page")
    codes = tokenizer.encode(to_model_range(torch.from_numpy(images())))
    number, i, j = (codes == view.codes[0]).nonzero()[0].tolist()
    centre = view.images["in context"][1 + 4 : 1 + 8, 1 + 4 : 1 + 8]
    assert np.array_equal(centre, images()[number, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4])
    unused = [place for place, count in enumerate(view.counts) if not count]
    for place in unused:
        assert (view.images["in context"][:, 1 + 13 * place : 13 * place + 13] == 224).all()


@pytest.mark.parametrize("kind", ["hierarchical", "residual", "fsq", "binary"])
def test_each_level_has_its_own_images(tmp_path, kind):
    tiny_tokenizer(**KINDS[kind]).save_pretrained(tmp_path / "tokenizer")
    views = codebook_page(tmp_path / "tokenizer", images(), tmp_path / "page")
    levels = len(TokenizerModule.from_pretrained(tmp_path / "tokenizer").layout)
    assert len(views) == levels and len(list((tmp_path / "page").glob("*.png"))) == 5 * levels
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 * levels
    assert "http:" not in page and "https:" not in page
    for view in views:
        assert (
            f"{view.statistics.usage:.1%} of the codes used, perplexity "
            f"{view.statistics.perplexity:,.1f}" in page
        )
        assert len(re.findall("<tr><td>", page)) == sum(len(v.codes) for v in views)


@pytest.mark.parametrize("kind", ["vq", "residual"])
def test_page_and_numbers_report_distinct_codes_and_reencoding(tmp_path, kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    views = codebook_page(tmp_path / "tokenizer", images(), tmp_path / "page")
    codes = tokenizer.encode(to_model_range(torch.from_numpy(images())))
    distinct = distinct_codes(tokenizer, count_codes(codes, tokenizer.layout))
    expected = reencoding_metrics(tokenizer, [(codes, to_uint8(tokenizer.decode(codes)))])
    expected |= {f"distinct_codes{level}": number for level, number in distinct.items()}
    numbers = json.loads((tmp_path / "page" / "codebook.json").read_text())
    page = (tmp_path / "page" / "index.html").read_text()
    for name in METRICS:
        assert numbers[name] == pytest.approx(expected[name])
        for number, view in enumerate(views, start=1):
            level = f"_level_{number}" if len(views) > 1 else ""
            assert view.metrics[name] == pytest.approx(expected[f"{name}{level}"])
            assert numbers["levels"][number - 1][name] == view.metrics[name]
    for metrics in [numbers, *(view.metrics for view in views)]:
        assert f"{metrics['distinct_codes']:,.0f} of the used codes draw differently" in page
        assert f"{metrics['reencode_agreement']:.1%} of the codes stay the same" in page
        assert f"{metrics['reencode_agreement_jpeg95']:.1%} after JPEG quality 95" in page


@pytest.mark.parametrize("mode", ["naive", "gumbel", "both"])
@pytest.mark.parametrize("kind", ["vq", "gumbel"])
def test_whole_images_of_the_most_used_codes_are_those_of_the_mode(
    monkeypatch, tmp_path, kind, mode
):
    monkeypatch.setattr(codebook_report, "_VIEWED", 5)
    monkeypatch.setattr(codebook_report, "gumbel_views", partial(gumbel_views, steps=2))
    tokenizer = tiny_tokenizer(**KINDS[kind])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (view,) = codebook_page(tmp_path / "tokenizer", images(), tmp_path / "page", mode=mode)
    names = ["naive", "gumbel"] if mode == "both" else [mode]
    codes = torch.tensor(view.codes[:5])
    expected = {
        "naive": naive_views(tokenizer, codes, torch.zeros(16, dtype=torch.long), (4, 4), 0),
        "gumbel": gumbel_views(tokenizer, codes, (4, 4), steps=2),
    }
    with Image.open(tmp_path / "page" / f"{'-and-'.join(names)}.png") as image:
        shown = np.asarray(image)
    for place, name in enumerate(names):
        left = 4 + 16 * place
        assert np.array_equal(shown[4:20, left : left + 16], expected[name].images[0].numpy())
    page = (tmp_path / "page" / "index.html").read_text()
    numbers = json.loads((tmp_path / "page" / "codebook.json").read_text())["levels"][0]
    assert list(numbers["code_fractions"]) == list(numbers["code_fraction"]) == names
    for name in names:
        fractions = expected[name].fractions
        assert numbers["code_fractions"][name] == fractions.tolist()
        assert numbers["code_fraction"][name] == pytest.approx(float(fractions.mean()))
        assert f"{name.capitalize()} images of the 5 most used codes" in page
        assert f"{fractions.mean():.1%} of an image's codes are the code that it shows" in page


def test_gumbel_images_of_other_quantizers_are_refused_before_any_work(tmp_path, monkeypatch):
    tiny_tokenizer(**KINDS["fsq"]).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.delattr(TokenizerModule, "encode")
    with pytest.raises(ValueError, match=r"is fsq, .* need one of vq, gumbel, score_function"):
        codebook_page(tmp_path / "tokenizer", images(), tmp_path / "page", mode="both")
    assert not (tmp_path / "page").exists()


def test_the_name_of_the_tokenizer_is_escaped_on_the_page(tmp_path):
    folder = tmp_path / "<script>a & b"
    tiny_tokenizer().save_pretrained(folder)
    codebook_page(folder, images(2), tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    escaped = "&lt;script&gt;a &amp; b"
    assert "<script" not in page
    assert f"{escaped}</title>" in page and f"{escaped}</h1>" in page


def test_codebook_command_uses_the_data_of_the_tokenizers_run(finished_run, tmp_path, capsys):
    folder = Path(shutil.copytree(finished_run[1], tmp_path / "run"))
    assert main(["codebook", "--tokenizer", str(folder / "tokenizer"), "--max-images", "20"]) == 0
    out = capsys.readouterr().out
    assert "of the codes used, perplexity" in out and "draw differently" in out
    assert "unchanged by encoding the decoded image" in out
    with Image.open(folder / "codebook" / "map.png") as image:
        assert len(np.unique(np.asarray(image))) > 2
    # Its own page is replaced
    assert main(["codebook", "--tokenizer", str(folder / "tokenizer"), "--max-images", "20"]) == 0
    numbers = json.loads((folder / "codebook" / "codebook.json").read_text())
    assert numbers["images"] == 20 and sum(numbers["levels"][0]["uses"]) == 20 * 16
    again = [
        "codebook",
        "--tokenizer",
        folder / "tokenizer",
        "--config",
        finished_run[0],
        "--out",
        tmp_path / "elsewhere",
    ]
    assert main([str(a) for a in again]) == 0 and (tmp_path / "elsewhere" / "index.html").is_file()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["naive"]),
        (["--mode", "naive"], ["naive"]),
        (["--mode", "gumbel"], ["gumbel"]),
        (["--mode", "both"], ["naive", "gumbel"]),
    ],
)
def test_the_command_shows_whole_images_by_mode(finished_run, tmp_path, capsys, options, names):
    tokenizer = finished_run[1] / "tokenizer"
    out = tmp_path / "page"
    arguments = ["codebook", "--tokenizer", tokenizer, "--max-images", 4, "--out", out, *options]
    assert main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"(\w+) images: [\d.]+% of their codes are the code shown", printed) == names
    assert (out / f"{'-and-'.join(names)}.png").is_file()


def test_an_unknown_mode_is_wrong_usage(finished_run, capsys):
    fails(
        capsys,
        ["codebook", "--tokenizer", finished_run[1] / "tokenizer", "--mode", "gumble"],
        "--mode is 'gumble'; choose one of: naive, gumbel, both",
        status=2,
    )


def test_missing_inputs_of_the_codebook_report_are_named(finished_run, tmp_path, capsys):
    fails(capsys, ["codebook", "--tokenizer", tmp_path / "none"], "there is no tokenizer in")
    shutil.copytree(finished_run[1] / "tokenizer", tmp_path / "tokenizer")
    fails(
        capsys,
        ["codebook", "--tokenizer", tmp_path / "tokenizer"],
        "it is not known which images to encode; add --config FILE",
    )
    fails(
        capsys,
        [
            "codebook",
            "--tokenizer",
            finished_run[1] / "tokenizer",
            "--out",
            tmp_path / "p",
            "--max-images",
            0,
        ],
        "--max-images is 0; it must be at least 1\n",
        status=2,
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    fails(
        capsys,
        ["codebook", "--tokenizer", finished_run[1] / "tokenizer", "--out", tmp_path / "thesis"],
        "holds no codebook page",
    )
    with pytest.raises(FileExistsError, match="holds no codebook page"):
        codebook_page(tmp_path / "tokenizer", images(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="there are no images to see the codes in"):
        codebook_page(tmp_path / "tokenizer", images(0), tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_bar_heights_match_values():
    chart = bars(np.array([4.0, 2.0, 0.0, 1.0]), height=8, width=8)
    filled = (chart == (40, 90, 160)).all(2).sum(0)
    assert filled.tolist() == [8, 8, 4, 4, 0, 0, 2, 2]
    assert (bars(np.zeros(3), height=4, width=3) == 255).all()
