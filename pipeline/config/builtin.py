"""Options of the sources that need no data of the user's: shapes, emoji and icons. Knows no
images."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.checks import out_of_range, problems


@dataclass(kw_only=True)
class ShapesOptions:
    """The scenes of the source `shapes` (`data.shapes`)."""

    min_objects: int = 1
    """Fewest objects in an image."""
    max_objects: int = 3
    """Most objects in an image."""
    grid_cells: int = 0
    """Evenly spaced positions per axis where objects can stand. Fewer positions make the scenes
    easier to learn; 0 allows any pixel."""
    num_scenes: int = 1_000_000
    """Images after which the scenes repeat."""

    def problems(self, image_size: int) -> list[str]:
        return problems(
            (
                not 1 <= self.min_objects <= self.max_objects <= 3,
                f"data.shapes.min_objects {self.min_objects} and data.shapes.max_objects "
                f"{self.max_objects} must satisfy 1 <= min <= max <= 3",
            ),
            (
                self.grid_cells != 0 and (self.grid_cells < 8 or image_size % self.grid_cells > 0),
                f"data.shapes.grid_cells is {self.grid_cells}; it must be 0 or a divisor of "
                f"data.image_size {image_size}, at least 8",
            ),
        ) + out_of_range(self, "data.shapes", "[1, inf]", "num_scenes")


@dataclass(kw_only=True)
class EmojiOptions:
    """Files and split of the source `emoji` (`data.emoji`)."""

    font: str | None = None
    """Path of NotoColorEmoji.ttf, where it is not in its usual place."""
    annotations: str | None = None
    """Folder `common` of the Unicode CLDR, with annotations/en.xml, where it is not in its usual
    place."""
    split_seed: int = 0
    """Chooses the names that are held out. To report metrics on names that no setting was chosen
    by, choose the settings in a run with another seed."""


@dataclass(kw_only=True)
class IconOptions:
    """Sets and names of the source `icons` (`data.icons`)."""

    folder: str = "~/.cache/mini-dalle/icons"
    """Folder of the sets, which `make icons` fills. Rendered images are kept there as well."""
    sets: list[str] = field(
        default_factory=lambda: ["noto", "twemoji", "fluent-emoji-flat", "emojione"]
    )
    """Names of sets in the folder; or paths of Iconify JSON files and of folders of .svg files."""
    annotations: str | None = None
    """Folder `common` of the Unicode CLDR, as of the emoji. Without it, icons are called as in
    their sets."""
    untoned_repeats: int = 1
    """How often each epoch has a drawing without a skin tone. In the default sets 47% of the
    drawings are skin tones of few people, which are learned long before the others."""

    def problems(self) -> list[str]:
        return problems(
            (not self.sets, "data.icons.sets is empty; name at least one set")
        ) + out_of_range(self, "data.icons", "[1, inf]", "untoned_repeats")
