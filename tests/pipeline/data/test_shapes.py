"""The shapes world: scenes are repeatable and match their captions, and the oracle reads them and
nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.config.builtin import ShapesOptions
from pipeline.config.data import DataConfig
from pipeline.data.builtin.shapes import (
    BACKGROUNDS,
    COLOURS,
    NEW_PAIRS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    ShapesWorld,
    draw,
    sprite,
)
from pipeline.data.builtin.shapes_captions import (
    GROUND_FRAMES,
    PLAIN_FRAMES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Claims,
    ObjectClaim,
    ShapesSource,
    clear_relation,
)
from pipeline.data.builtin.shapes_oracle import Verdict, check, components, read_scene
from pipeline.evaluation.shapes import accuracies_by_kind


def accuracy(verdicts: list[Verdict]) -> dict[str, float]:
    return {kind: found.value for kind, found in accuracies_by_kind(verdicts).items()}


def source(split: str = "held_out", size: int = 64) -> ShapesSource:
    return ShapesSource(DataConfig(source="shapes", image_size=size), split)


def test_a_scene_depends_on_its_number_alone():
    one, two = ShapesWorld(seed=3), ShapesWorld(seed=3)
    assert [one.scene(i) for i in (5, 9)] == [two.scene(i) for i in (9, 5)][::-1]
    assert np.array_equal(one.images([5, 9])[1], two.images([9])[0])
    assert (
        one.scene(5)
        != ShapesWorld(seed=4).scene(5)
        != ShapesWorld(seed=3, split="held_out").scene(5)
    )
    assert source().prompts([7])[0] == source().prompts([6, 7])[1]


def test_scenes_are_as_varied_as_documented():
    assert (
        len(SHAPES) >= 8
        and len(COLOURS) >= 9
        and len(SIZES) >= 3
        and len(BACKGROUNDS) >= 5
        and len(RELATION_WORDS) == 4
    )
    assert len(PLAIN_FRAMES) + len(GROUND_FRAMES) >= 6
    scenes = [ShapesWorld().scene(i) for i in range(600)]
    items = [item for scene in scenes for item in scene.items]
    assert {len(s.items) for s in scenes} == {1, 2, 3} and {s.background for s in scenes} == set(
        BACKGROUNDS
    )
    assert (
        {i.shape for i in items} == set(SHAPES)
        and {i.colour for i in items} == set(COLOURS)
        and {i.size for i in items} == set(SIZES)
    )


def test_every_caption_word_is_used():
    text = " | ".join(source().captions(range(1500)))
    words = [
        w
        for table in (SIZE_WORDS, SHAPE_WORDS, RELATION_WORDS)
        for group in table.values()
        for w in group
    ]
    assert [
        w
        for w in [*words, "violet", "turquoise", "background", "image of", "drawing of"]
        if w not in text
    ] == []


def test_new_pairs_are_never_in_training_and_always_in_their_split():
    assert len({shape for shape, _ in NEW_PAIRS}) == len(SHAPES) == len(NEW_PAIRS)
    for split in ("train", "held_out"):
        assert not any(
            (i.shape, i.colour) in NEW_PAIRS
            for n in range(800)
            for i in ShapesWorld(split=split).scene(n).items
        )
    for n in range(200):
        assert any(
            (i.shape, i.colour) in NEW_PAIRS for i in ShapesWorld(split="new_pairs").scene(n).items
        )


@pytest.mark.parametrize("size", [32, 64, 96])
def test_objects_are_inside_the_image_and_do_not_overlap(size):
    world = ShapesWorld(size)
    for n in range(300):
        items = world.scene(n).items
        for i, item in enumerate(items):
            half = SIZES[item.size] * size
            assert half <= item.x <= size - half and half <= item.y <= size - half
            for other in items[:i]:
                assert (
                    max(abs(item.x - other.x), abs(item.y - other.y))
                    >= half + SIZES[other.size] * size + 2
                )


def test_palette_colours_are_distinct():
    every = [*COLOURS.values(), *BACKGROUNDS.values()]
    for i, a in enumerate(every):
        for b in every[:i]:
            assert np.linalg.norm(np.subtract(a, b)) > 55
    for colour in COLOURS.values():
        for ground in BACKGROUNDS.values():
            assert np.linalg.norm(np.subtract(colour, ground)) > 80


def test_rendered_object_has_its_colour_and_area():
    image = draw(Scene("white", (Item("square", "red", "large", 32, 32),)), 64)
    assert tuple(image[32, 32]) == COLOURS["red"] and tuple(image[0, 0]) == (255, 255, 255)
    redness = (255 - image[..., 1].astype(float)) / (255 - COLOURS["red"][1])
    assert redness.sum() == pytest.approx(sprite("square", "large", 64).sum(), rel=0.01)


def test_spatial_relations_are_stated_only_when_clear():
    def at(x, y):
        return Item("circle", "red", "small", x, y)

    assert clear_relation(at(10, 30), at(40, 32), 64) == "left of"
    assert clear_relation(at(40, 32), at(10, 30), 64) == "right of"
    assert clear_relation(at(30, 10), at(33, 50), 64) == "above"
    assert clear_relation(at(33, 50), at(30, 10), 64) == "below"
    assert clear_relation(at(10, 10), at(40, 40), 64) is None  # diagonal
    assert clear_relation(at(30, 30), at(34, 30), 64) is None  # too near


@pytest.mark.parametrize(("size", "count"), [(64, 500), (32, 200), (96, 60)])
def test_oracle_accepts_real_images(size, count):
    world = source(size=size)
    prompts = world.prompts(range(count))
    shares = accuracy(
        [
            check(image, p.claims)
            for image, p in zip(world.images(range(count)), prompts, strict=True)
        ]
    )
    assert shares["correct"] == 1 and set(shares) == {
        "correct",
        "redraw",
        "count",
        "shapes",
        "colours",
        "sizes",
        "relations",
        "background",
    }


def test_the_oracle_reads_the_whole_scene():
    world = ShapesWorld(split="held_out")
    for n in range(100):
        scene = world.scene(n)
        reading = read_scene(draw(scene, 64))
        assert reading.background == scene.background and reading.unreadable == 0
        found = sorted((i.shape, i.colour, i.size) for i in reading.items)
        assert found == sorted((i.shape, i.colour, i.size) for i in scene.items)
        for item in scene.items:
            assert any(abs(f.x - item.x) <= 2 and abs(f.y - item.y) <= 2 for f in reading.items)


def test_the_oracle_reads_through_blur_and_noise():
    world, rng = source(), np.random.default_rng(0)
    prompts, verdicts = world.prompts(range(150)), []
    for image, prompt in zip(world.images(range(150)), prompts, strict=True):
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))
        noisy = (blurred + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
        verdicts.append(check(noisy, prompt.claims))
    shares = accuracy(verdicts)
    assert all(shares[kind] > 0.95 for kind in ("count", "shapes", "colours", "sizes", "relations"))


def test_the_oracle_accepts_noise_that_changes_no_pixel_much():
    world, rng = source(), np.random.default_rng(0)
    images = world.images(range(60)) + rng.normal(0, 8, (60, 64, 64, 3))
    noisy = images.clip(0, 255).astype(np.uint8)
    prompts = world.prompts(range(60))
    assert all(check(i, p.claims).correct for i, p in zip(noisy, prompts, strict=True))


def red_circle(ground: str = "white") -> tuple[np.ndarray, Claims]:
    """A large red circle in the middle, and claims that it satisfies."""
    image = draw(Scene(ground, (Item("circle", "red", "large", 32, 32),)), 64)
    claims = Claims((ObjectClaim("circle", "red", "large"),), (), ground)
    assert check(image, claims).correct
    return image, claims


def test_an_object_in_two_colours_is_not_correct():
    image, claims = red_circle()
    blue = draw(Scene("white", (Item("circle", "blue", "large", 32, 32),)), 64)
    half = np.concatenate([image[:, :36], blue[:, 36:]], axis=1)
    verdict = check(half, claims)
    assert verdict.shapes and verdict.colours and not verdict.redraw and not verdict.correct


def test_a_colour_outside_the_palette_is_no_colour():
    image, _ = red_circle("silver")
    black = np.where((image == COLOURS["red"]).all(-1, keepdims=True), 5, image).astype(np.uint8)
    brown = Claims((ObjectClaim("circle", "brown", None),))
    assert not read_scene(black).items and not check(black, brown).correct
    ground = np.full((64, 64, 3), (225, 225, 225), np.uint8)  # between white and silver
    assert read_scene(ground).unreadable


def test_specks_are_not_correct():
    image, claims = red_circle()
    for n in range(14):
        image[2 + 4 * n, 2 : 2 + 1 + n % 2] = COLOURS["blue"]
    verdict = check(image, claims)
    assert verdict.count and not verdict.redraw and not verdict.correct


def test_a_few_pixels_may_differ():
    image, claims = red_circle()
    image[0, :12] = COLOURS["blue"]
    assert check(image, claims).correct
    image[0, 12] = COLOURS["blue"]
    assert not check(image, claims).correct


def changed(scene: Scene, rng: np.random.Generator, what: str) -> Scene:
    """The scene with one object's attribute replaced, or an object gone."""
    first, *rest = scene.items
    pools: dict[str, list[str]] = {
        "shape": list(SHAPES),
        "colour": list(COLOURS),
        "size": list(SIZES),
    }
    if what == "background":
        return replace(
            scene, background=str(rng.choice([b for b in BACKGROUNDS if b != scene.background]))
        )
    if what == "count":
        return replace(scene, items=tuple(rest))
    other = str(rng.choice([v for v in pools[what] if v != getattr(first, what)]))
    return replace(scene, items=(replace(first, **{what: other}), *rest))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["shape", "colour", "size", "count", "background"])
def test_the_oracle_rejects_an_image_with_one_thing_changed(what):
    world, rng, wrong = ShapesWorld(split="held_out", min_objects=2), np.random.default_rng(1), []
    for n in range(120):
        scene = world.scene(n)
        claims = Claims(
            tuple(ObjectClaim(i.shape, i.colour, i.size) for i in scene.items), (), scene.background
        )
        other = changed(scene, rng, what)
        assert check(draw(scene, 64), claims).correct
        wrong.append(check(draw(other, 64), claims).correct)
    assert np.mean(wrong) <= 0.01


def test_oracle_rejects_a_reversed_relation():
    scene = Scene(
        "white", (Item("circle", "red", "small", 15, 30), Item("star", "blue", "small", 45, 30))
    )
    objects = (ObjectClaim("circle", "red", None), ObjectClaim("star", "blue", None))
    image = draw(scene, 64)
    assert check(image, Claims(objects, ((0, "left of", 1),))).correct
    verdict = check(image, Claims(objects, ((0, "right of", 1),)))
    assert verdict.relations is False and not verdict.correct and verdict.shapes and verdict.colours


def test_a_relation_holds_along_the_axis_on_which_objects_are_farther_apart():
    objects = (ObjectClaim("circle", "red", None), ObjectClaim("star", "blue", None))
    items = (Item("circle", "red", "small", 28, 12), Item("star", "blue", "small", 32, 52))
    image = draw(Scene("white", items), 64)
    assert check(image, Claims(objects, ((0, "above", 1),))).correct
    assert check(image, Claims(objects, ((0, "left of", 1),))).relations is False


def test_swapped_captions_are_rejected():
    world = source()
    prompts, images = world.prompts(range(200)), world.images(range(1, 201))
    assert (
        np.mean([check(i, p.claims).correct for i, p in zip(images, prompts, strict=True)]) <= 0.01
    )


def test_a_smear_is_unreadable():
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    image[5:9, 3:60] = COLOURS["red"]
    reading = read_scene(image)
    assert reading.unreadable == 1 and not reading.items
    assert not check(reading, Claims((ObjectClaim("square", "red", None),))).correct


def test_connected_components_match_hand_computation():
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=bool)
    assert sorted(sorted(map(tuple, c.tolist())) for c in components(mask)) == [
        [(0, 0), (0, 1)],
        [(2, 0)],
        [(2, 2)],
    ]


def test_invalid_shapes_settings_are_refused():
    with pytest.raises(ValueError, match="need at least 32 pixels"):
        ShapesWorld(16)
    with pytest.raises(ValueError, match="1 <= min <= max <= 3"):
        ShapesWorld(max_objects=4)
    with pytest.raises(ValueError, match="is no split"):
        ShapesWorld(split="test")
    with pytest.raises(ValueError, match="is no shape"):
        from pipeline.data.builtin.shapes import _inside

        _inside("blob", np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match=r"must be uint8 \(S,S,3\)"):
        read_scene(np.zeros((64, 64), dtype=np.uint8))
    with pytest.raises(ValueError, match="at least 32"):
        read_scene(np.zeros((16, 16, 3), dtype=np.uint8))


def test_objects_are_on_grid_cells():
    items = [item for i in range(200) for item in ShapesWorld(grid_cells=8).scene(i).items]
    assert {item.x % 8 for item in items} == {item.y % 8 for item in items} == {0}
    assert len({item.x for item in items}) >= 5 and any(
        i.x % 8 for n in range(20) for i in ShapesWorld().scene(n).items
    )


@pytest.mark.parametrize("grid_cells", [7, 4, 24])
def test_grid_that_does_not_fit_is_refused(grid_cells):
    with pytest.raises(ValueError, match=f"grid_cells is {grid_cells}.*divisor of image_size 64"):
        ShapesWorld(grid_cells=grid_cells)
    with pytest.raises(ValueError, match=f"data.shapes.grid_cells is {grid_cells}"):
        DataConfig(source="shapes", shapes=ShapesOptions(grid_cells=grid_cells))
