"""Where pictures and captions come from. Knows settings only; opens nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class DataConfig:
    """The source of pictures (`data` in a YAML)."""

    source: str
    """`shapes`, `emoji`, a folder of pictures with captions, a saved `datasets` folder, or a `datasets` name."""
    image_size: int = 64
    """Height and width of a picture, in pixels; larger ones are cropped to their centre and shrunk."""
    held_out: float = 0.05
    """Share of the pictures kept from training, chosen by a hash of each picture's name."""
    upscale: bool = False
    """Enlarge pictures that are smaller than `image_size` instead of leaving them out."""
    image_column: str = "image"
    """Column of the pictures (`datasets`)."""
    text_column: str = "text"
    """Column of the captions (`datasets`, metadata files)."""
    max_bad: float = 0.01
    """Largest share of unreadable pictures; above it loading stops."""
    min_objects: int = 1
    """Fewest objects of a picture (`shapes`)."""
    max_objects: int = 3
    """Most objects of a picture (`shapes`)."""
    lattice: int = 0
    """Places a side, evenly spaced, on which objects stand (`shapes`): fewer make the world easier to learn; 0 is any pixel."""
    world_size: int = 1_000_000
    """Pictures after which the `shapes` repeat."""
    font: str | None = None
    """Path of NotoColorEmoji.ttf (`emoji`), where it is not in its usual place."""
    annotations: str | None = None
    """Folder `common` of the Unicode CLDR, with annotations/en.xml (`emoji`), where it is not in its usual place."""

    def __post_init__(self) -> None:
        problems = []
        if not self.source:
            problems.append("data.source is empty; give shapes, emoji, a folder or a datasets name")
        if self.image_size < 16:
            problems.append(f"data.image_size is {self.image_size}; it must be at least 16")
        if self.source == "shapes" and self.image_size < 32:
            problems.append(f"data.image_size is {self.image_size}; the shapes need at least 32")
        if not 0 < self.held_out < 1:
            problems.append(f"data.held_out is {self.held_out}; it must be between 0 and 1")
        if not 0 <= self.max_bad <= 1:
            problems.append(f"data.max_bad is {self.max_bad}; it must be in [0, 1]")
        if not 1 <= self.min_objects <= self.max_objects <= 3:
            problems.append(
                f"data.min_objects {self.min_objects} and data.max_objects {self.max_objects} must satisfy 1 <= min <= max <= 3"
            )
        if self.lattice and (self.lattice < 8 or self.image_size % self.lattice):
            problems.append(f"data.lattice is {self.lattice}; it must be 0 or a divisor of data.image_size {self.image_size}, at least 8")
        if self.world_size < 1:
            problems.append(f"data.world_size is {self.world_size}; it must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))
