"""Where images and captions come from. Knows settings only; opens nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.builtin import EmojiOptions, IconOptions, ShapesOptions
from pipeline.config.checks import out_of_range, problems, refuse

RangeSetting = Literal["auto", "8bit", "10bit", "12bit", "14bit", "16bit"] | list[float]
"""`data.value_range`."""
SYNTHETIC_SOURCES = ("shapes", "emoji", "icons")
"""Sources that are rendered here. Settings of files (filters, columns, crops) do not concern
them."""
CaptionLines = Literal["each", "joined", "first"]


def background(alpha: str) -> tuple[int, int, int] | None:
    """The colour that `data.alpha` lays transparent images on; None keeps their transparency.

    Raises:
        ValueError: it is neither `keep`, `white` nor a colour.
    """
    if alpha == "keep":
        return None
    if alpha == "white":
        return (255, 255, 255)
    if re.fullmatch(r"#[0-9a-fA-F]{6}", alpha) is None:
        raise ValueError(f"data.alpha is {alpha!r}; give keep, white, or a colour such as #e0e0e0")
    red, green, blue = bytes.fromhex(alpha[1:])
    return (red, green, blue)


def range_problems(values: list[float], name: str) -> list[str]:
    """What is wrong with the values shown black and white."""
    numbers = all(isinstance(value, int | float) and abs(value) < float("inf") for value in values)
    return problems(
        (
            len(values) != 2 or not numbers or not values[0] < values[1],
            f"{name} is {values}; it must be two numbers, the value shown black and then the "
            "larger one shown white, such as [0, 4095]",
        )
    )


@dataclass(kw_only=True)
class MixPart:
    """One source of several (`data.mix`). Settings that it omits follow `data`."""

    source: str
    """As `data.source`."""
    weight: float = 1.0
    """Its share of every batch, relative to the other parts' weights."""
    image_column: str | None = None
    """As `data.image_column`."""
    text_column: str | None = None
    """As `data.text_column`."""
    caption_template: str | None = None
    """As `data.caption_template`."""
    delimiter: str | None = None
    """As `data.delimiter`."""
    split_column: str | None = None
    """As `data.split_column`."""
    held_out_source: str | None = None
    """As `data.held_out_source`."""
    value_range: RangeSetting | None = None
    """As `data.value_range`."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"data.mix: the weight of {self.source} is {self.weight}; it must be above 0, and "
                "finite"
            )
        if isinstance(self.value_range, list):
            refuse(range_problems(self.value_range, f"data.mix: the value_range of {self.source}"))


@dataclass(kw_only=True)
class FilterOptions:
    """Which images and captions are skipped (`data.filter`)."""

    min_size: int | None = None
    """Shorter side, in pixels, below which images are skipped, besides those that do not cover
    `image_size` (which `upscale` keeps)."""
    max_size: int | None = None
    """Longer side, in pixels, above which images are skipped."""
    max_aspect: float | None = None
    """Ratio of the longer to the shorter side above which images are skipped."""
    min_caption: int = 1
    """Length in characters below which captions are skipped, and images that have no other."""
    max_caption: int | None = None
    """Length in characters above which captions are skipped, and images that have no other."""
    max_corrupt_fraction: float = 0.01
    """Largest fraction of unreadable images; above it, loading stops."""

    def problems(self) -> list[str]:
        return [
            *problems(
                (
                    self.max_aspect is not None and self.max_aspect < 1,
                    f"data.filter.max_aspect is {self.max_aspect}; it is the longer over the "
                    "shorter side, so it must be at least 1",
                ),
                (
                    self.max_caption is not None and self.max_caption < self.min_caption,
                    f"data.filter.max_caption is {self.max_caption}; it must be at least "
                    f"data.filter.min_caption {self.min_caption}",
                ),
            ),
            *out_of_range(self, "data.filter", "[0, 1]", "max_corrupt_fraction"),
            *out_of_range(self, "data.filter", "[1, inf]", "min_caption"),
        ]


@dataclass(kw_only=True)
class TagOptions:
    """How captions that are lists of tags vary in training (`data.tags`)."""

    separator: str = ", "
    """Between the tags of a caption; spaces around it do not count."""
    shuffle: bool = False
    """Shuffle the tags each time a caption is used."""
    dropout: float = 0.0
    """Probability that a tag is left out each time. One tag stays."""
    keep_first: int = 0
    """Leading tags that are neither shuffled nor left out."""

    @property
    def vary(self) -> bool:
        """Whether captions are changed at all."""
        return self.shuffle or self.dropout > 0

    def problems(self) -> list[str]:
        return [
            *problems(
                (
                    not self.separator.strip(),
                    f"data.tags.separator is {self.separator!r}; it needs a character, as in ', '",
                )
            ),
            *out_of_range(self, "data.tags", "[0, 1)", "dropout"),
            *out_of_range(self, "data.tags", "[0, inf]", "keep_first"),
        ]


@dataclass(kw_only=True)
class StreamOptions:
    """How shards are read (`data.stream`, with `data.streaming`)."""

    shuffle_buffer: int = 1000
    """Images per block that is shuffled, after the shards are. They are held undecoded."""
    shards_per_worker: int = 4
    """Shards that each process reads concurrently."""

    def problems(self) -> list[str]:
        return out_of_range(self, "data.stream", "[1, inf]", "shuffle_buffer", "shards_per_worker")


@dataclass(kw_only=True)
class DataConfig:
    """The source of images (`data` in a YAML)."""

    source: str = ""
    """`shapes`; `emoji`; `icons`; a folder of images; a .csv, .tsv, .json, .jsonl, .txt or .parquet
    file; a .txt list of paths; a folder, glob or URL of webdataset .tar shards; a saved `datasets`
    folder, or a `datasets` name. docs/data.md has an example of each."""
    mix: list[MixPart] = field(default_factory=list)
    """Several sources in place of `source`, mixed by weight."""
    image_size: int | tuple[int, int] = 64
    """Height and width of an image, in pixels, or `[height, width]` where they differ; larger ones
    are cropped and shrunk."""
    value_range: RangeSetting = "auto"
    """The values shown black and white of images with more than 8 bits per value: a number of bits,
    or both values, such as [0, 1] or [-1024, 3071]. `auto` takes what the values of the whole
    source leave no doubt of, and asks otherwise. Images of 8 bits are taken as they are."""
    max_pixels: int = 64_000_000
    """Width times height above which images are skipped. JPEGs count as large as they are decoded:
    at a half, a quarter or an eighth of their size where that is enough."""
    follow_links: bool = False
    """Read files outside of a folder that links in it lead to."""
    upscale: bool = False
    """Enlarge images that are smaller than `image_size` instead of skipping them."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of an image training sees: the largest one of the shape of `image_size`, centred,
    or one at a random position."""
    crop_scale: float = 1.0
    """Smallest side of a random part, as a fraction of the largest part's."""
    alpha: str = "white"
    """What becomes of transparency: `keep` it as a fourth channel (with
    `tokenizer.model.channels: 4`), or lay images on `white` or on a colour such as `#e0e0e0`."""
    flip: bool = False
    """Mirror half of the images in training. For captions that do not mention left and right, and
    images without writing."""
    val_fraction: float = 0.05
    """Fraction of the images held out from training, chosen by a hash of each image's name; at
    least one image, unless it is 0. Not used where the data name what is held out."""
    split_column: str = "auto"
    """Column that says which images are held out: train, validation or test. `auto` takes the
    splits that folders, files, `datasets` or a column `split` name; `none` takes no such names."""
    held_out_source: str | None = None
    """A second source, as `source`, whose images are those held out. All others are trained on,
    save those that `source` names as validation or test."""
    image_column: str | None = None
    """Column of the images: paths, bytes or `datasets` images. Absent, it is whichever exists of
    image, file_name, path, jpg, jpeg, png, webp."""
    text_column: str = "text"
    """Column of the captions: a text, a list of texts, or a class label, whose name is the caption.
    Where there is no column `text`, it is whichever exists of txt, caption, captions."""
    caption_lines: CaptionLines = "each"
    """Lines of NAME.txt: each is a caption, all are joined into one, or the first one counts."""
    delimiter: str | None = None
    """Character between the columns of .csv, .tsv and .txt, or `\\t`. Absent, it is found in the
    first line: comma, tab, semicolon or bar."""
    tags: TagOptions = field(default_factory=TagOptions)
    """Captions that are lists of tags: shuffled, or some left out, each time they are used."""
    caption_template: str | None = None
    """Captions built from columns, in place of `text_column`: "a photo of a {colour} {label}".
    Folders have the columns `folder` and `name`."""
    filter: FilterOptions = field(default_factory=FilterOptions)
    """Which images and captions are skipped."""
    streaming: bool = False
    """Read shards or a `datasets` name from beginning to end instead of in any order, for data that
    is not on this disk."""
    stream: StreamOptions = field(default_factory=StreamOptions)
    """How shards are read while streaming."""
    shapes: ShapesOptions = field(default_factory=ShapesOptions)
    """The scenes of `source: shapes`."""
    emoji: EmojiOptions = field(default_factory=EmojiOptions)
    """Files and split of `source: emoji`."""
    icons: IconOptions = field(default_factory=IconOptions)
    """Sets and names of `source: icons`."""
    workers: int = 2
    """Threads per process that read, decode and shrink images."""
    cache_gb: float = 1.0
    """GiB per process for decoded images that may be needed again; 0 decodes them every time."""

    @property
    def channels(self) -> int:
        """Of the images: 4 where transparency is kept."""
        return 4 if background(self.alpha) is None else 3

    def __post_init__(self) -> None:
        background(self.alpha)
        self.image_size = canonical_size(self.image_size)
        refuse(
            self._source_problems(),
            self._image_problems(),
            out_of_range(self, "data", "[1, inf]", "workers"),
            self.filter.problems(),
            self.tags.problems(),
            self.stream.problems(),
            self.shapes.problems(self.size[0]),
            self.icons.problems(),
        )

    def _source_problems(self) -> list[str]:
        shapes = "shapes" in self.sources
        return problems(
            (
                not self.source and not self.mix,
                "data.source is empty; give shapes, emoji, icons, a folder, a file, shards or a "
                "datasets name (docs/data.md)",
            ),
            (
                bool(self.source and self.mix),
                f"data.source is {self.source} and data.mix has {len(self.mix)} parts; give one of "
                "the two",
            ),
            (
                self.delimiter is not None and len(self.delimiter.replace("\\t", "\t")) != 1,
                f"data.delimiter is {self.delimiter!r}; it must be one character, or \\t for a tab",
            ),
            (len(self.mix) > 100, f"data.mix has {len(self.mix)} parts; give at most 100"),
            (
                shapes and min(self.size) < 32,
                f"data.image_size is {as_setting(self.size)}; the shapes need at least 32",
            ),
            (
                self.size[0] != self.size[1] and any(s in SYNTHETIC_SOURCES for s in self.sources),
                f"data.image_size is {as_setting(self.size)}, and shapes, emoji and icons are "
                "drawn as squares alone; give one number (64)",
            ),
            (
                self.crop == "random" and any(s in SYNTHETIC_SOURCES for s in self.sources),
                "data.crop is random, and shapes, emoji and icons fill their images; set it to "
                "centre",
            ),
            (
                self.flip and shapes,
                "data.flip is on, and captions of the shapes say what is left and right; set it to "
                "false",
            ),
            (
                self.held_out_source is not None and bool(self.mix),
                f"data.held_out_source is {self.held_out_source} and data.mix has {len(self.mix)} "
                "parts; give each part its own held_out_source",
            ),
            (
                self.held_out_source is not None
                and not {self.source, self.held_out_source}.isdisjoint(SYNTHETIC_SOURCES),
                f"data.held_out_source is {self.held_out_source} and data.source {self.source}; "
                "shapes, emoji and icons have splits of their own, leave it out",
            ),
            (
                self.streaming and self.source in SYNTHETIC_SOURCES,
                f"data.streaming is on, and {self.source} are drawn here; set it to false",
            ),
        )

    def _image_problems(self) -> list[str]:
        smallest = self.filter.min_size
        largest = self.filter.max_size
        least_longer = max(self.least_size, 1 if self.upscale else max(self.size))
        found = problems(
            (
                min(self.size) < 16,
                f"data.image_size is {as_setting(self.size)}; it must be at least 16",
            ),
            (
                not 0 <= self.val_fraction < 1,
                f"data.val_fraction is {self.val_fraction}; it must be 0 or more, and below 1",
            ),
            (
                smallest is not None and smallest < min(self.size) and not self.upscale,
                f"data.filter.min_size is {smallest}, below data.image_size "
                f"{as_setting(self.size)}; raise it, or set data.upscale=true",
            ),
            (
                largest is not None and largest < least_longer,
                f"data.filter.max_size is {largest} and images of at least {least_longer} are "
                "wanted; raise it, or lower data.filter.min_size",
            ),
            (
                not 0 < self.crop_scale <= 1 or (self.crop_scale < 1 and self.crop == "centre"),
                f"data.crop_scale is {self.crop_scale}; it must be in (0, 1], and 1 unless "
                "data.crop is random",
            ),
        )
        if isinstance(self.value_range, list):
            found += range_problems(self.value_range, "data.value_range")
        return [
            *found,
            *out_of_range(self, "data", "[0, inf]", "cache_gb"),
            *out_of_range(self, "data", "[1, inf]", "max_pixels"),
        ]

    @property
    def sources(self) -> list[str]:
        """The source, or those of all parts."""
        return [part.source for part in self.mix] or [self.source]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def values(self) -> tuple[float, float] | None:
        """`value_range` as the values shown black and white; None where it is `auto`."""
        if isinstance(self.value_range, list):
            return float(self.value_range[0]), float(self.value_range[1])
        if self.value_range == "auto":
            return None
        return 0.0, 2.0 ** int(self.value_range.removesuffix("bit")) - 1

    @property
    def least_size(self) -> int:
        """Shorter side, in pixels, below which images are skipped."""
        return self.filter.min_size or (1 if self.upscale else min(self.size))

    @property
    def varies(self) -> bool:
        """Whether training sees an image differently every time."""
        return self.crop == "random" or self.flip

    def of_part(self, part: MixPart, *, streaming: bool) -> DataConfig:
        """The configuration of one part alone."""
        own = {
            f.name: getattr(part, f.name)
            for f in fields(part)
            if f.name != "weight" and getattr(part, f.name) is not None
        }
        return replace(self, mix=[], streaming=streaming, **own)


MAX_PIXELS = DataConfig.max_pixels
"""Most pixels of an image that is decoded, by default. A small file can declare many more."""


def canonical_size(image_size: int | Sequence[int]) -> int | tuple[int, int]:
    """An `image_size` in its one form: a number where height and width are equal, so that settings
    and fingerprints of squares do not depend on how they were given.

    Raises:
        ValueError: there are neither one number nor two.
    """
    if isinstance(image_size, int):
        return image_size
    if len(image_size) != 2:
        raise ValueError(
            f"data.image_size is {list(image_size)}; it must be one number, or [height, width]"
        )
    height, width = image_size
    return height if height == width else (height, width)


def as_setting(size: tuple[int, int]) -> int | list[int]:
    """A height and a width as `image_size` in a YAML, for messages."""
    height, width = size
    return height if height == width else [height, width]


CHANGES_NO_IMAGE = ("workers", "cache_gb", "tags")
"""Fields of `DataConfig` that change neither images nor which captions each has: how fast images
come, and how a prior's training varies captions."""
KNOWN_BY_CONTENT = ("source", "split_column", "held_out_source")
"""Fields of `DataConfig` and of its parts that lead to images and splits. A fingerprint of what
they lead to is compared in their place, so that moved data stay the same data."""


_NEWER = {
    "alpha": "white",
    "caption_lines": "each",
    "delimiter": None,
    "follow_links": False,
    "held_out_source": None,
    "max_pixels": MAX_PIXELS,
    "split_column": "auto",
    "value_range": "auto",
}
"""Fields that are left out with these values: there are runs and fingerprints of data that do not
know them."""


def data_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A `DataConfig` as plain values, without what changes no image. Fields that are newer than
    some runs are left out where they have their defaults."""
    settings = {
        name: value
        for name, value in config.items()
        if name not in CHANGES_NO_IMAGE and not (name in _NEWER and value == _NEWER[name])
    }
    # A seed of 0 is left out: there are runs and fingerprints of data that know no seed.
    settings["emoji"] = {
        name: value for name, value in config["emoji"].items() if name != "split_seed" or value
    }
    # Icons are known by a fingerprint of their names and pixels.
    settings.pop("icons", None)
    settings["mix"] = [
        {name: value for name, value in part.items() if value is not None or name not in _NEWER}
        for part in config["mix"]
    ]
    return settings


def tag_settings(config: DataConfig) -> dict[str, Any] | None:
    """How a prior's training varies captions; None where it does not, as in runs that do not know
    it."""
    return asdict(config.tags) if config.tags.vary else None


def settings_beside_content(settings: dict[str, Any]) -> dict[str, Any]:
    """`data_settings` without the names that lead to the images: what must stay the same where a
    fingerprint of the images is compared as well."""
    own = {name: value for name, value in settings.items() if name not in KNOWN_BY_CONTENT}
    own["mix"] = [
        {name: value for name, value in part.items() if name not in KNOWN_BY_CONTENT}
        for part in settings.get("mix") or []
    ]
    return own


def settings_by_place(settings: dict[str, Any]) -> dict[str, Any]:
    """`data_settings` in which every spelling of a path that exists is the same."""
    own = {**settings, "mix": [settings_by_place(part) for part in settings.get("mix") or []]}
    for name in ("source", "held_out_source"):
        if own.get(name) and Path(own[name]).expanduser().exists():
            own[name] = str(Path(own[name]).expanduser().resolve())
    return own
