"""Where images and captions come from. Knows settings only; opens nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

SYNTHETIC_SOURCES = ("shapes", "emoji")
"""Sources that are drawn here; what is read from files (filters, columns, crops) does not concern
them."""


@dataclass(kw_only=True)
class MixPart:
    """One source of several (`data.mix`). What it leaves out is as in `data`."""

    source: str
    """As `data.source`."""
    weight: float = 1.0
    """Its share of every batch, against the other parts' weights."""
    image_column: str | None = None
    """As `data.image_column`."""
    text_column: str | None = None
    """As `data.text_column`."""
    caption_template: str | None = None
    """As `data.caption_template`."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"data.mix: the weight of {self.source} is {self.weight}; it must be above 0, and "
                "finite"
            )


@dataclass(kw_only=True)
class DataConfig:
    """The source of images (`data` in a YAML)."""

    source: str = ""
    """`shapes`; `emoji`; a folder of images; a .csv, .jsonl or .parquet file; a folder, glob or
    URL of webdataset .tar shards; a saved `datasets` folder, or a `datasets` name. docs/data.md has
    an example of each."""
    mix: list[MixPart] = field(default_factory=list)
    """Several sources in place of `source`, mixed by weight."""
    image_size: int = 64
    """Height and width of an image, in pixels; larger ones are cropped and shrunk."""
    val_fraction: float = 0.05
    """Share of the images kept from training, chosen by a hash of each image's name."""
    upscale: bool = False
    """Enlarge images that are smaller than `image_size` instead of leaving them out."""
    streaming: bool = False
    """Read shards or a `datasets` name from beginning to end instead of row by row, for data that
    is not on this disk."""
    shuffle_buffer: int = 1000
    """Images that are shuffled among each other while streaming, after the shards; they are held
    undecoded."""
    shards_per_worker: int = 4
    """Shards that each process reads side by side while streaming."""
    image_column: str | None = None
    """Column of the images: paths, bytes or `datasets` images. Absent, it is whichever there is
    of image, file_name, path, jpg, png."""
    text_column: str = "text"
    """Column of the captions: a text, a list of texts, or a class label, whose name is the caption
    (NAME.txt holds one a line)."""
    caption_template: str | None = None
    """Captions put together from columns, in place of `text_column`: "a photo of a {colour}
    {label}". Folders have the columns `folder` and `name`."""
    min_size: int | None = None
    """Shorter side, in pixels, below which images are left out (`image_size`, unless
    `upscale`)."""
    max_size: int | None = None
    """Longer side, in pixels, above which images are left out."""
    max_aspect: float | None = None
    """Longer over shorter side above which images are left out."""
    min_caption: int = 1
    """Length in characters below which captions are left out, and images that have no other."""
    max_caption: int | None = None
    """Length in characters above which captions are left out, and images that have no other."""
    crop: Literal["centre", "random"] = "centre"
    """Which square of an image is seen in training: the largest one in its middle, or one anywhere
    in it."""
    crop_scale: float = 1.0
    """Smallest side of a random square, as a share of the image's shorter side."""
    flip: bool = False
    """Mirror half of the images in training; for captions that say nothing of left and right, and
    images without writing."""
    workers: int = 2
    """Threads of each process that read, decode and shrink images."""
    cache_gb: float = 1.0
    """GiB for images that have been decoded and may be needed again; 0 decodes them every
    time."""
    max_corrupt_fraction: float = 0.01
    """Largest share of unreadable images; above it loading stops."""
    min_objects: int = 1
    """Fewest objects of an image (`shapes`)."""
    max_objects: int = 3
    """Most objects of an image (`shapes`)."""
    grid_cells: int = 0
    """Places a side, evenly spaced, on which objects stand (`shapes`): fewer make the world easier
    to learn; 0 is any pixel."""
    num_scenes: int = 1_000_000
    """Images after which the `shapes` repeat."""
    font: str | None = None
    """Path of NotoColorEmoji.ttf (`emoji`), where it is not in its usual place."""
    annotations: str | None = None
    """Folder `common` of the Unicode CLDR, with annotations/en.xml (`emoji`), where it is not in
    its usual place."""

    def __post_init__(self) -> None:
        problems = []
        if not self.source and not self.mix:
            problems.append(
                "data.source is empty; give shapes, emoji, a folder, a file, shards or a datasets "
                "name (docs/data.md)"
            )
        if self.source and self.mix:
            problems.append(
                f"data.source is {self.source} and data.mix has {len(self.mix)} parts; give one of "
                "the two"
            )
        if self.image_size < 16:
            problems.append(f"data.image_size is {self.image_size}; it must be at least 16")
        if "shapes" in self.sources and self.image_size < 32:
            problems.append(f"data.image_size is {self.image_size}; the shapes need at least 32")
        if not 0 < self.val_fraction < 1:
            problems.append(f"data.val_fraction is {self.val_fraction}; it must be between 0 and 1")
        if not 0 <= self.max_corrupt_fraction <= 1:
            problems.append(
                f"data.max_corrupt_fraction is {self.max_corrupt_fraction}; it must be in [0, 1]"
            )
        if not 1 <= self.min_objects <= self.max_objects <= 3:
            problems.append(
                f"data.min_objects {self.min_objects} and data.max_objects {self.max_objects} must "
                "satisfy 1 <= min <= max <= 3"
            )
        if self.grid_cells and (self.grid_cells < 8 or self.image_size % self.grid_cells):
            problems.append(
                f"data.grid_cells is {self.grid_cells}; it must be 0 or a divisor of "
                f"data.image_size {self.image_size}, at least 8"
            )
        for name in ("num_scenes", "shuffle_buffer", "shards_per_worker", "workers", "min_caption"):
            if getattr(self, name) < 1:
                problems.append(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if self.min_size is not None and self.min_size < self.image_size and not self.upscale:
            problems.append(
                f"data.min_size is {self.min_size}, below data.image_size {self.image_size}; raise "
                "it, or set data.upscale=true"
            )
        if self.max_size is not None and self.max_size < self.least_size:
            problems.append(
                f"data.max_size is {self.max_size}; images of at least {self.least_size} are "
                "wanted (data.min_size)"
            )
        if len(self.mix) > 100:
            problems.append(f"data.mix has {len(self.mix)} parts; 100 are the most")
        if self.max_aspect is not None and self.max_aspect < 1:
            problems.append(
                f"data.max_aspect is {self.max_aspect}; it is the longer over the shorter side, at "
                "least 1"
            )
        if self.max_caption is not None and self.max_caption < self.min_caption:
            problems.append(
                f"data.max_caption is {self.max_caption}; it must be at least data.min_caption "
                f"{self.min_caption}"
            )
        if not 0 < self.crop_scale <= 1 or (self.crop_scale < 1 and self.crop == "centre"):
            problems.append(
                f"data.crop_scale is {self.crop_scale}; it must be in (0, 1], and 1 unless "
                "data.crop is random"
            )
        if self.crop == "random" and any(source in SYNTHETIC_SOURCES for source in self.sources):
            problems.append(
                "data.crop is random, and shapes and emoji fill their images; set it to centre"
            )
        if self.flip and "shapes" in self.sources:
            problems.append(
                "data.flip is on, and captions of the shapes say what is left and right; set it to "
                "false"
            )
        if self.cache_gb < 0:
            problems.append(f"data.cache_gb is {self.cache_gb}; it must be 0 or more")
        if self.streaming and self.source in SYNTHETIC_SOURCES:
            problems.append(
                f"data.streaming is on, and {self.source} are drawn here; set it to false"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def sources(self) -> list[str]:
        """The source, or those of all parts."""
        return [part.source for part in self.mix] or [self.source]

    @property
    def least_size(self) -> int:
        """Shorter side, in pixels, below which images are left out."""
        return self.min_size or (1 if self.upscale else self.image_size)

    @property
    def varies(self) -> bool:
        """Whether an image is not seen the same every time."""
        return self.crop == "random" or self.flip

    def of_part(self, part: MixPart, *, streaming: bool) -> DataConfig:
        """The configuration of one part alone."""
        own = {
            f.name: getattr(part, f.name)
            for f in fields(part)
            if f.name != "weight" and getattr(part, f.name) is not None
        }
        return replace(self, mix=[], streaming=streaming, **own)


CHANGES_NO_PICTURE = ("workers", "cache_gb")
"""Fields of `DataConfig` that say how fast images come, and not which."""


def data_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A `DataConfig` as plain values, without what changes no image."""
    return {name: value for name, value in config.items() if name not in CHANGES_NO_PICTURE}
