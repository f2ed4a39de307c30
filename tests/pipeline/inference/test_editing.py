"""Edits, scores and `best_of`: what is kept, what is refused, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from pipeline.inference import pipeline
from pipeline.inference.editing import keep_mask, place_on_canvas, random_keep_mask
from pipeline.inference.reranking import choice_scores
from stage1_tokenizer import Level
from stage2_prior import PriorModule, SamplingOptions, StreamConfig, sample
from tests.helpers.cli import fails


def untrained_pipe(run: Path, **trained: object) -> TextToImagePipeline:
    """A run's tokenizers with a prior for any order whose weights are random; what is kept does not
    depend on what it learned."""
    pipe = TextToImagePipeline.from_pretrained(run / "bundle")
    config = StreamConfig(**{**vars(pipe.prior.stream.config), "any_order": True})
    torch.manual_seed(0)
    prior = PriorModule(pipe.prior.model_config, config)
    prior.set_codebook(pipe.tokenizer.code_vectors)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    for name, value in {
        "trained_order": "random",
        "trained_with_caption_dropout": True,
        "trained_image_first": True,
        **trained,
    }.items():
        setattr(prior.config, name, value)
    return TextToImagePipeline(pipe.tokenizer, prior.eval(), pipe.text, pipe.defaults)


@pytest.fixture(scope="module")
def pipe(finished_run) -> TextToImagePipeline:
    return untrained_pipe(finished_run[1])


@pytest.fixture
def original() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def test_an_edit_keeps_codes_and_pixels_outside_the_mask(pipe, original):
    mask = box(9, 0, 20, 12)  # cells 1 and 2 of rows 0 and 1
    out = pipe.edit(original, mask, "a red circle", num_images=3, seed=1)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[:2, 1:3] = False
    before = pipe.tokenizer.to_codes([original])[0]
    assert all(torch.equal(codes[kept], before[kept]) for codes in out.codes)
    assert len({tuple(codes[~kept].tolist()) for codes in out.codes}) > 1
    outside = np.asarray(mask) == 0
    for image, codes in zip(out.images, out.codes, strict=True):
        assert np.array_equal(np.asarray(image)[outside], np.asarray(original)[outside])
        drawn = np.asarray(pipe.tokenizer.to_images(codes[None])[0])
        assert np.array_equal(np.asarray(image)[~outside], drawn[~outside])
    again = pipe.edit(original, mask, "a red circle", num_images=1, seed=1)
    assert torch.equal(again.codes[0], out.codes[0])
    assert not torch.equal(pipe.edit(original, mask, "a red circle", seed=2).codes[0], out.codes[0])
    torch.testing.assert_close(out.log_likelihood[0], again.log_likelihood[0])


def test_empty_mask_changes_nothing_and_warns(pipe, original):
    with pytest.warns(UserWarning, match="the mask is empty") as caught:
        out = pipe.edit(original, Image.new("1", (32, 32), 0), "a red circle", num_images=2)
    assert caught[0].filename == __file__
    assert [np.array_equal(np.asarray(image), np.asarray(original)) for image in out.images] == [
        True,
        True,
    ]
    assert out.log_likelihood.tolist() == [0, 0] and out.codes.shape == (2, 4, 4)
    assert out.seeds == pipe.plan(["a red circle"], num_images=2, seed=0).seeds


def test_full_mask_is_plain_sampling_and_warns(pipe, original):
    with pytest.warns(UserWarning, match="plain sampling"):
        out = pipe.edit(
            original, Image.new("L", (32, 32), 255), "a red circle", num_images=2, seed=3
        )
    plain = pipe("a red circle", num_images_per_prompt=2, seed=3)
    assert torch.equal(out.codes, plain.codes)
    assert [np.asarray(a).tobytes() for a in out.images] == [
        np.asarray(b).tobytes() for b in plain.images
    ]


def test_masks_and_images_that_do_not_fit_are_named(pipe, original):
    with pytest.raises(ValueError, match="the mask is 16x32 and the image 32x32"):
        pipe.edit(original, Image.new("L", (16, 32)), "x")
    with pytest.raises(
        ValueError, match=r"the mask has mode RGB; it must be black and white.*convert it first"
    ):
        pipe.edit(original, Image.new("RGB", (32, 32)), "x")
    with pytest.raises(
        ValueError, match="the image is 40x32 and this prior draws 32x32; crop or resize it first"
    ):
        pipe.edit(Image.new("RGB", (40, 32)), Image.new("L", (40, 32)), "x")


def test_editing_with_a_raster_prior_names_the_setting_to_train(finished_run, original):
    raster = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    with pytest.raises(
        ValueError,
        match=r"need a prior that was trained on random orders.*prior\.train\.code_order=random",
    ):
        raster.edit(original, box(0, 0, 9, 9), "x")


def test_a_raster_prior_completes_from_the_top_rows(finished_run, original):
    raster = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:2] = True
    codes = raster.tokenizer.to_codes([original])[0]
    for given in (original, codes):
        out = raster.complete(given, known, "a red circle", num_images=2)
        assert torch.equal(out.codes[:, :2], codes[:2].expand(2, 2, 4))
    with pytest.raises(
        ValueError,
        match=r"known is torch\.int64 \(4, 4\); it must be bool and say for each of the 16 codes",
    ):
        raster.complete(original, known.long(), "x")
    with pytest.raises(ValueError, match="num_images is 0"):
        raster.complete(original, known, "x", num_images=0)


def test_an_image_is_extended_on_a_larger_canvas(pipe):
    small = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    out = pipe.outpaint(small, "a red circle", at=(8, 0), num_images=2)
    for image in out.images:
        assert np.array_equal(np.asarray(image)[:16, 8:], np.asarray(small))
    with pytest.raises(ValueError, match="16x24 at 9, 9 does not lie on the canvas of 32x32"):
        pipe.outpaint(small.rotate(90, expand=True), "x", at=(9, 9))
    with pytest.raises(ValueError, match="fills the canvas"):
        place_on_canvas(Image.new("RGB", (32, 32)), (32, 32), 3, (0, 0))


def test_variation_resamples_the_given_fraction_of_codes(pipe, original):
    before = pipe.tokenizer.to_codes([original])[0].flatten()
    with pytest.warns(UserWarning, match="without a caption"):
        out = pipe.vary(original, 0.25, num_images=8, seed=4)
    changed = (out.codes.flatten(1) != before).sum(1)
    assert changed.max() <= 4 and changed.sum() > 8
    assert len({tuple(row.nonzero()[:, 0].tolist()) for row in out.codes.flatten(1) != before}) > 4
    with pytest.raises(ValueError, match=r"strength is 1\.5"):
        pipe.vary(original, 1.5, "x")
    assert random_keep_mask([1, 2], 16, 0.01).sum().item() == 30  # at least one is resampled


def test_mask_applies_to_every_level_of_codes():
    replaced = np.zeros((8, 8), bool)
    replaced[0, 0] = True
    kept = keep_mask(replaced, [Level(grid=(2, 2), num_codes=3), Level(grid=(4, 4), num_codes=3)])
    assert kept[:4].tolist() == [False, True, True, True]
    assert kept[4:].tolist() == [False] + [True] * 15


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_best_of_keeps_the_image_with_the_highest_choice_score(pipe, guidance_scale):
    from stage2_prior import code_log_likelihood
    from stage2_prior.order import seeded_orders

    prompts = ["a red circle", "a blue star"]
    every = pipe(prompts, num_images_per_prompt=6, guidance_scale=guidance_scale)
    ids = pipe.text.encode(prompts).repeat_interleave(6, 0)
    orders, flat = seeded_orders(every.seeds, 16), every.codes.flatten(1)
    null = code_log_likelihood(pipe.prior, pipe.prior.stream.null_caption(12), flat, orders).sum(1)
    given = code_log_likelihood(pipe.prior, ids, flat, orders).sum(1)
    scores = choice_scores(given.view(4, 3), null.view(4, 3))
    best = pipe(prompts, num_images_per_prompt=2, best_of=3, guidance_scale=guidance_scale)
    chosen = scores.argmax(1) + torch.arange(0, 12, 3)
    assert torch.equal(best.codes, every.codes[chosen]) and len(best.images) == len(best.seeds) == 4
    assert best.seeds == [every.seeds[i] for i in chosen]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_best_of_scores_full_sequences_when_steps_draw_several_codes(pipe, guidance_scale):
    from stage2_prior import code_log_likelihood
    from stage2_prior.order import seeded_orders

    every = pipe(
        ["a red circle"],
        num_images_per_prompt=6,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
    )
    ids, flat, orders = (
        pipe.text.encode(["a red circle"]).expand(6, -1),
        every.codes.flatten(1),
        seeded_orders(every.seeds, 16),
    )
    given, null = (
        code_log_likelihood(pipe.prior, t, flat, orders).sum(1)
        for t in (ids, pipe.prior.stream.null_caption(6))
    )
    best = pipe(["a red circle"], best_of=6, num_inference_steps=3, guidance_scale=guidance_scale)
    assert torch.equal(
        best.codes[0], every.codes[int(choice_scores(given[None], null[None]).argmax())]
    )


def test_scorer_without_candidates_or_with_too_few_scores_is_refused(pipe):
    with pytest.raises(ValueError, match="best_of is 1; ask for more"):
        pipe("x", judge=lambda images, prompts: [0.0] * len(images))
    with pytest.raises(ValueError, match="the scorer gave 1 scores for 2 images"):
        pipe("x", best_of=2, judge=lambda images, prompts: [0.0])


def test_default_steps_of_a_bundle_apply_to_whole_images_only(pipe, original):
    stepped = TextToImagePipeline(
        pipe.tokenizer, pipe.prior, pipe.text, SamplingOptions(num_inference_steps=16)
    )
    assert stepped.edit(original, box(0, 0, 8, 8), "x").codes.shape == (1, 4, 4)
    with pytest.raises(
        ValueError, match="num_inference_steps is 2; it must be at least 1 and at most the 1 codes"
    ):
        stepped.edit(original, box(0, 0, 8, 8), "x", num_inference_steps=2)


def test_codes_of_another_image_are_refused_and_small_types_are_taken(pipe, original):
    known = torch.arange(16) < 4
    codes = pipe.codes_of([original]).flatten() % 256
    kept = pipe.complete(codes.to(torch.uint8), known, "x").codes
    assert torch.equal(kept, pipe.complete(codes, known, "x").codes)
    most = pipe.prior.stream.num_codes - 1
    with pytest.raises(ValueError, match=f"a known code is {most + 1}; there it must be 0 to"):
        pipe.complete(torch.full((16,), most + 1), known, "x")


def test_one_candidate_may_be_a_text(pipe, original):
    assert pipe.caption(original, "a red heart") == pipe.caption(original, ["a red heart"])


def test_many_candidates_are_scored_in_parts(pipe, original, monkeypatch):
    candidates = ["a red heart", "a blue star", "a green moon", "a red star", "a blue heart"]
    together = pipe.caption(original, candidates)
    parts = []
    plain = pipeline.caption_log_likelihood

    def counted(prior, ids, codes):
        parts.append(len(ids))
        return plain(prior, ids, codes)

    monkeypatch.setattr(pipeline, "caption_log_likelihood", counted)
    monkeypatch.setattr(pipeline, "CAPTIONS_AT_A_TIME", 2)
    found = pipe.caption(original, candidates)
    assert parts == [2, 2, 1]
    assert [text for text, _ in found] == [text for text, _ in together]
    assert [value for _, value in found] == pytest.approx([value for _, value in together])


def test_mismatched_counts_and_codes_are_named(pipe, original):
    for call in (
        lambda: pipe.edit(original, box(0, 0, 8, 8), "x", num_images=0),
        lambda: pipe.vary(original, 0.5, "x", num_images=0),
    ):
        with pytest.raises(ValueError, match="num_images is 0; it must be at least 1"):
            call()
    with pytest.raises(ValueError, match="num is 0"):
        pipe.caption(original, num=0)
    with pytest.raises(ValueError, match="the number of candidates is 0"):
        pipe.caption(original, [])
    with pytest.raises(ValueError, match="temperature is -1"):
        pipe.caption(original, temperature=-1)
    with pytest.raises(ValueError, match=r"the codes are \(3, 3\); this prior's images have 16"):
        pipe.complete(torch.zeros(3, 3, dtype=torch.long), torch.zeros(16, dtype=torch.bool), "x")
    with pytest.raises(ValueError, match="all 16 codes are known"):
        pipe.complete(original, torch.ones(16, dtype=torch.bool), "x")


def test_best_of_can_use_a_scorer(pipe):
    every = pipe(["a red circle"], num_images_per_prompt=4)

    def brightest(images, prompts):
        assert prompts == ["a red circle"] * 4
        return [float(np.asarray(image).mean()) for image in images]

    best = pipe(["a red circle"], best_of=4, judge=brightest)
    assert torch.equal(
        best.codes[0], every.codes[int(np.argmax(brightest(every.images, ["a red circle"] * 4)))]
    )


def test_best_of_requires_a_score(finished_run):
    pipe = untrained_pipe(finished_run[1], trained_with_caption_dropout=False)
    with pytest.raises(ValueError, match="best_of is 0; it must be at least 1"):
        pipe(["a red circle"], best_of=0)
    with pytest.raises(ValueError, match="it was trained without caption dropout"):
        pipe(["a red circle"], best_of=2, guidance_scale=1.0)
    best = pipe("x", best_of=2, guidance_scale=1.0, judge=lambda images, prompts: [0.0, 1.0])
    assert len(best.images) == 1


def test_captions_are_scored_and_sampled(pipe, original, finished_run):
    ranked = pipe.caption(original, ["a red circle", "a tiny blue star", "x"])
    assert sorted(text for text, _ in ranked) == ["a red circle", "a tiny blue star", "x"]
    assert [value for _, value in ranked] == sorted((value for _, value in ranked), reverse=True)
    assert len(pipe.caption(original, num=3, seed=1)) == 3 and pipe.caption(
        original, num=2, seed=1
    ) == pipe.caption(original, num=2, seed=1)
    raster = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    with pytest.raises(ValueError, match=r"sequence\.captioning_fraction=0\.2"):
        raster.caption(original)


@pytest.mark.parametrize("bf16", [True, False])
def test_images_are_encoded_in_the_precision_of_the_prior(finished_run, original, bf16):
    pipe = untrained_pipe(finished_run[1])
    pipe.trained_on = {"codes_in_bf16": bf16}
    seen = []
    pipe.tokenizer.encoder.register_forward_hook(
        lambda _, inputs, output: seen.append(output.dtype)
    )
    pipe.vary(original, 0.5, "x")
    pipe.score([original], ["x"])
    pipe.caption(original, num=1)
    assert seen == [torch.bfloat16 if bf16 else torch.float32] * 3


def test_a_bundle_knows_the_precision_of_its_codes(finished_run):
    from pipeline.data.codes.dataset import read_manifest

    trained_on = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle").trained_on
    assert trained_on["codes_in_bf16"] == read_manifest(finished_run[1] / "codes")["bf16"]


def test_unknown_sampling_options_are_named(pipe):
    with pytest.raises(
        ValueError, match=r"\['top_P'\] are no sampling options; choose among \['guidance_scale'"
    ):
        pipe("x", top_P=0.5)
    with pytest.raises(
        ValueError,
        match="num_inference_steps is 17; it must be at least 1 and at most the 16 codes",
    ):
        pipe("x", num_inference_steps=17)


def test_edit_command_writes_images(finished_run, tmp_path, original, capsys):
    untrained_pipe(finished_run[1]).save_pretrained(tmp_path / "bundle")
    original.save(tmp_path / "p.png")
    box(0, 0, 16, 16).save(tmp_path / "m.png")
    original.crop((0, 0, 16, 16)).save(tmp_path / "small.png")
    command = [
        "edit",
        "--bundle",
        tmp_path / "bundle",
        "--image",
        tmp_path / "p.png",
        "--prompt",
        "a red circle",
    ]
    run = [
        str(a)
        for a in [
            *command,
            "--mask",
            tmp_path / "m.png",
            "--num-images",
            2,
            "--num-inference-steps",
            2,
            "--out",
            tmp_path / "out",
        ]
    ]
    assert main(run) == 0 and "wrote 2 images" in capsys.readouterr().out
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    ]
    assert (
        len(rows) == 2
        and rows[0]["prompt"] == "a red circle"
        and (tmp_path / "out" / "grid.png").is_file()
    )
    with Image.open(tmp_path / "out" / rows[0]["file"]) as image:
        assert np.array_equal(np.asarray(image)[16:], np.asarray(original)[16:])
    small = [
        "edit",
        "--bundle",
        tmp_path / "bundle",
        "--image",
        tmp_path / "small.png",
        "--outpaint-at",
        16,
        16,
        "--num-images",
        1,
        "--out",
        tmp_path / "o",
    ]
    assert main([str(a) for a in small]) == 0 and "note: an empty prompt" in capsys.readouterr().out
    assert (
        main(
            [
                str(a)
                for a in [*command, "--strength", 0.5, "--num-images", 1, "--out", tmp_path / "v"]
            ]
        )
        == 0
    )
    Image.new("L", (32, 32), 0).save(tmp_path / "empty.png")
    assert (
        main(
            [
                str(a)
                for a in [
                    *command,
                    "--mask",
                    tmp_path / "empty.png",
                    "--num-images",
                    1,
                    "--out",
                    tmp_path / "e",
                ]
            ]
        )
        == 0
    )
    assert "note: the mask is empty" in capsys.readouterr().out
    Image.new("RGB", (32, 32), 0).save(tmp_path / "rgb.png")
    fails(
        capsys,
        [*command, "--mask", tmp_path / "rgb.png", "--out", tmp_path / "no"],
        "the mask has mode RGB",
    )
    fails(
        capsys,
        [*command, "--mask", tmp_path / "none.png", "--out", tmp_path / "no"],
        "there is no image",
    )
    assert main([str(a) for a in command]) == 2 and not (tmp_path / "no").exists()


def test_generate_passes_every_sampling_option(finished_run, tmp_path, monkeypatch, capsys):
    untrained_pipe(finished_run[1]).save_pretrained(tmp_path / "bundle")
    given = {
        "guidance_scale": 2.0,
        "guidance_interval": (0.0, 0.5),
        "guidance_power": 1.5,
        "temperature": 0.9,
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.001,
        "num_inference_steps": 4,
    }
    flags = [
        a
        for name, value in given.items()
        for a in (f"--{name}", *(value if isinstance(value, tuple) else [value]))
    ]
    seen = []
    drawing = "pipeline.inference.batching.sample"
    monkeypatch.setattr(
        drawing,
        lambda prior, ids, seeds, options, **how: (
            seen.append((options, how)),
            sample(prior, ids, seeds, options, **how),
        )[1],
    )
    bundle = [
        "generate",
        "--bundle",
        tmp_path / "bundle",
        "a red circle",
        "--num-images",
        1,
        "--out",
        tmp_path / "out",
    ]
    assert main([str(a) for a in [*bundle, *flags, "--best-of", 3, "--compile", "off"]]) == 0
    options, how = seen[0]
    assert options == SamplingOptions(**given) and not how["compiled"] and len(seen) == 1
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 1
    fails(
        capsys,
        [*bundle, "--clip-scorer", tmp_path / "none", "--best-of", 2],
        "cannot be loaded as a CLIP model",
    )


def test_the_command_line_has_every_sampling_option():
    from dataclasses import fields

    from pipeline.cli.generate import Sampling
    from stage2_prior import SamplingOptions

    assert list(Sampling.__annotations__) == [field.name for field in fields(SamplingOptions)]


def test_long_prompts_are_cut_in_every_way_of_editing_only_if_asked_for(pipe, original):
    prompt = "word " * 99
    small = original.resize((16, 16))
    for edit in (
        lambda **options: pipe.edit(original, box(0, 0, 16, 16), prompt, **options),
        lambda **options: pipe.outpaint(small, prompt, **options),
        lambda **options: pipe.vary(original, 0.5, prompt, **options),
        lambda **options: pipe.complete(original, torch.arange(16) < 4, prompt, **options),
    ):
        with pytest.raises(ValueError, match="text slots"):
            edit()
        assert len(edit(truncate=True, num_images=2).images) == 2
