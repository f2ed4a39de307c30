"""The rows of an engine with their keys and values: how they are filled, moved, freed and advanced.
Knows row numbers; no requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from stage2_prior.compilation import Steps, StepShape, capture_cuda_graph
from stage2_prior.model import ImagePrior
from stage2_prior.step import Filters, Layout, Rows, advance
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask

_CAPTIONS_KEPT = 16
"""Captions whose keys and values stay, for further rows of them."""


class Table:
    """Rows for one prior, on its device.

    Args:
        steps: what is compiled.
    """

    def __init__(self, prior: ImagePrior, num_rows: int, steps: Steps) -> None:
        self.prior = prior
        self.num_rows = num_rows
        self.steps = steps
        self.rows = Rows.empty(prior, num_rows)
        self.cache = prior.new_cache(num_rows)
        self._tables = prior.tables()
        self._captions: OrderedDict[tuple[int, ...], KeyValueCache] = OrderedDict()
        self._layouts: dict[tuple[int, StepShape], Layout] = {}
        """By first row and shape. They keep their memory, which CUDA graphs read."""
        self._laid_out: dict[tuple[int, StepShape], tuple[list[int], list[int]]] = {}
        """What these hold: `own` and `null` of `layout`."""
        self._graphs: dict[StepShape, Callable[[], None] | None] = {}
        """CUDA graphs of steps; None where the step ran once, and is compiled by now."""

    def index(self, rows: Sequence[int]) -> Tensor:
        """Row numbers on the table's device."""
        return torch.tensor(rows, dtype=torch.long, device=self.prior.device)

    def write(self, at: Sequence[int], values: Rows, *, also_null: bool = False) -> None:
        """Fills rows with the values of as many others, on the CPU; reads their captions, and their
        codes up to `filled`.

        Args:
            also_null: whether the null caption is read with them, since it is needed soon.
        """
        index = self.index(at)
        for own, new in zip(self.rows, values, strict=True):
            own[index] = new.to(own.device)
        for value in self.cache.values:
            value[index] = 0  # a masked nan of an earlier image would make nan
        stream = self.prior.stream
        captions = values.ids[:, : stream.text_length]
        read = torch.cat([captions, stream.null_caption(1)]) if also_null else captions
        caches = self._read_captions([tuple(caption) for caption in read.tolist()])
        of_row = [tuple(caption) for caption in captions.tolist()]
        for key in dict.fromkeys(of_row):
            rows = [row for row, other in zip(at, of_row, strict=True) if other == key]
            self.cache.copy_from(caches[key], self.index([0] * len(rows)), self.index(rows))
        self._read_codes(at, values.filled.tolist())

    def copy_as_null(self, rows: Sequence[int], at: Sequence[int]) -> None:
        """Fills the rows `at` with those of images, but for the null caption."""
        values = Rows(*(one[self.index(rows)].cpu() for one in self.rows))
        stream = self.prior.stream
        values.ids[:, : stream.text_length] = stream.null_caption(1)
        self.write(at, values)

    def move(self, rows: Sequence[int], to: Sequence[int]) -> None:
        """Copies rows with their keys and values to others, and frees them."""
        source, target = self.index(rows), self.index(to)
        for one in (*self.rows, *self.cache.keys, *self.cache.values):
            one[target] = one[source]
        self.free(rows)

    def free(self, rows: Sequence[int]) -> None:
        """Makes rows stand still."""
        index = self.index(rows)
        text = self.prior.stream.text_length
        for one, value in (
            (self.rows.active, 0),
            (self.rows.filled, text - 1),
            (self.rows.position, text),
        ):
            one[index] = value

    def layout(self, first: int, shape: StepShape, own: list[int], null: list[int]) -> Layout:
        """Which of the rows from `first` on belong to which image; `own` and `null` are their row
        numbers, the same where an image has no other."""
        key = (first, shape)
        if key not in self._layouts:
            self._layouts[key] = Layout.empty(
                self.prior, shape.num_rows, shape.num_images, guided=shape.guided
            )
        layout = self._layouts[key]
        if self._laid_out.get(key) == (own, null):
            return layout
        self._laid_out[key] = (own, null)
        of_row = [0] * shape.num_rows
        for image, (row, other) in enumerate(zip(own, null, strict=True)):
            of_row[row - first] = of_row[other - first] = image
        layout.image.copy_(torch.tensor(of_row))
        for held, rows in ((layout.own, own), (layout.null, null)):
            if held is not None:
                filled_up = rows + rows[:1] * (shape.num_images - len(rows))
                held.copy_(torch.tensor(filled_up) - first)
        return layout

    def advance(self, first: int, layout: Layout, filters: Filters, width: int) -> None:
        """Takes a step of the layout's rows, from `first` on."""
        self._step(advance, first, layout, filters, width)()

    def advance_single(self, layout: Layout, shape: StepShape) -> None:
        """Takes a step of one code of the first rows, compiled where that is there."""
        compiled = self.steps.advance(shape)
        step = self._step(compiled or advance, 0, layout, shape.filters, 1)
        if compiled is not None and self.prior.device.type == "cuda":
            if shape in self._graphs:
                self._graphs[shape] = step = self._graphs[shape] or capture_cuda_graph(step)
            else:
                self._graphs[shape] = None
        step()

    def _step(
        self, step: Callable[..., None], first: int, layout: Layout, filters: Filters, width: int
    ) -> Callable[[], None]:
        part = slice(first, first + len(layout.image))
        cache = self.cache.rows(part)
        rows = self.rows.part(part)
        return partial(step, self.prior, self._tables, cache, rows, layout, filters, width)

    def _read_captions(
        self, captions: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], KeyValueCache]:
        """Keys and values of all but the last token of each caption, which is computed once."""
        caches = {caption: self._captions.get(caption) for caption in captions}
        new = [caption for caption, cache in caches.items() if cache is None]
        if new:
            ids = torch.tensor(new, device=self.prior.device)[:, :-1]
            cache = self.prior.new_cache(len(new), ids.shape[1])
            self.steps.prefill(self.prior, self._tables, cache, ids)
            caches |= {new[i]: cache.rows(slice(i, i + 1)) for i in range(len(new))}
        found = {caption: cache for caption, cache in caches.items() if cache is not None}
        self._captions |= found
        for caption in found:
            self._captions.move_to_end(caption)
        while len(self._captions) > _CAPTIONS_KEPT:
            self._captions.popitem(last=False)
        return found

    def _read_codes(self, at: Sequence[int], filled: Sequence[int]) -> None:
        """Computes keys and values of codes up to the position `filled`, exclusive, of each row.
        Neighbours that have as many are computed at once."""
        first = self.prior.stream.text_length - 1
        rows = sorted(zip(at, filled, strict=True))
        # Neighbours are as far from their rank as each other.
        ranked = enumerate(rows)
        for (end, _), group in groupby(ranked, lambda one: (one[1][1], one[1][0] - one[0])):
            neighbours = [row for _, (row, _) in group]
            if end == first:
                continue
            part = slice(neighbours[0], neighbours[-1] + 1)
            positions = torch.arange(first, end, device=self.prior.device)
            past = CacheView(
                self.cache.rows(part),
                positions,
                attention_mask(positions, positions, self.cache.capacity),
            )
            self.prior.features(
                self.rows.ids[part, first:end],
                self.rows.position_ids[part, first:end],
                self.rows.position_ids[part, first + 1 : end + 1],
                self._tables,
                past,
            )
