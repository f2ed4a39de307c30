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
from stage2_prior.model import PriorModule
from stage2_prior.step import Filters, Layout, Rows, advance
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask

_CAPTIONS_KEPT = 16
"""Captions whose keys and values stay, for further rows of them."""


_TOKENS_READ = 2048
"""About the most tokens of known codes that are computed at once. On a CPU attention keeps a number
for each pair of tokens."""


class Table:
    """Rows for one prior, on its device.

    Args:
        steps: what is compiled.
    """

    def __init__(self, prior: PriorModule, num_rows: int, steps: Steps) -> None:
        self.prior = prior
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
        for held in (*self.cache.keys, *self.cache.values):
            held[index] = 0  # a masked nan of an earlier image would make nan
        stream = self.prior.stream
        captions = values.ids[:, : stream.text_length]
        read = torch.cat([captions, stream.null_caption(1, "cpu")]) if also_null else captions
        self._read_captions(at, [tuple(caption) for caption in read.tolist()])
        self._read_codes(at, values.filled.tolist())

    def copy_as_null(self, rows: Sequence[int], at: Sequence[int]) -> None:
        """Fills the rows `at` with those of images, but for the null caption."""
        values = Rows(*(one[self.index(rows)].cpu() for one in self.rows))
        stream = self.prior.stream
        values.ids[:, : stream.text_length] = stream.null_caption(1, "cpu")
        self.write(at, values)

    def move(self, rows: Sequence[int], to: Sequence[int]) -> None:
        """Copies rows with their keys and values to others."""
        source, target = self.index(rows), self.index(to)
        for one in (*self.rows, *self.cache.keys, *self.cache.values):
            one[target] = one[source]

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
        of_row = [0] * shape.num_rows
        for image, (row, other) in enumerate(zip(own, null, strict=True)):
            of_row[row - first] = of_row[other - first] = image
        layout.image.copy_(torch.tensor(of_row, device="cpu"))
        layout.own.copy_(torch.tensor(own, device="cpu") - first)
        if layout.null is not None:
            layout.null.copy_(torch.tensor(null, device="cpu") - first)
        self._laid_out[key] = (own, null)
        return layout

    def advance(self, first: int, layout: Layout, filters: Filters, width: int) -> None:
        """Takes a step of the layout's rows, from `first` on."""
        self._step(advance, first, layout, filters, width)()

    def advance_single(self, layout: Layout, shape: StepShape) -> None:
        """Takes a step of one code of the first rows, compiled where that is there."""
        if graph := self._graphs.get(shape):
            graph()
            return
        compiled = self.steps.advance(shape)
        step = self._step(compiled or advance, 0, layout, shape.filters, 1)
        if compiled is not None and self.prior.device.type == "cuda":
            if shape in self._graphs:
                self._graphs[shape] = step = capture_cuda_graph(step, self.prior.device)
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

    def _read_captions(self, at: Sequence[int], captions: Sequence[tuple[int, ...]]) -> None:
        """Writes keys and values of all but the last token of captions into rows; more captions
        than rows are read for later. Each one is computed once."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._captions]
        for caption in dict.fromkeys(captions):
            if caption in self._captions:
                rows = [row for row, other in zip(at, captions, strict=False) if other == caption]
                zeros = self.index([0] * len(rows))
                self.cache.copy_from(self._captions[caption], zeros, self.index(rows))
                self._captions.move_to_end(caption)
        if not new:
            return
        ids = torch.tensor(new, device=self.prior.device)[:, :-1]
        cache = self.prior.new_cache(len(new), ids.shape[1])
        self.steps.prefill(self.prior, self._tables, cache, ids)
        places = {caption: number for number, caption in enumerate(new)}
        pairs = [(places[c], row) for row, c in zip(at, captions, strict=False) if c in places]
        if pairs:
            sources = self.index([place for place, _ in pairs])
            self.cache.copy_from(cache, sources, self.index([row for _, row in pairs]))
        for caption in new[-_CAPTIONS_KEPT:]:
            self._captions[caption] = cache.rows(
                slice(places[caption], places[caption] + 1)
            ).clone()
        null = tuple(self.prior.stream.null_caption(1, "cpu")[0].tolist())
        if null in self._captions:
            self._captions.move_to_end(null)
        while len(self._captions) > _CAPTIONS_KEPT:
            self._captions.popitem(last=False)

    def _read_codes(self, at: Sequence[int], filled: Sequence[int]) -> None:
        """Computes keys and values of codes up to the position `filled`, exclusive, of each row.
        Neighbours that have as many are computed at once, within `_TOKENS_READ`."""
        first = self.prior.stream.text_length - 1
        rows = sorted(zip(at, filled, strict=True))
        # Neighbours are as far from their rank as each other.
        ranked = enumerate(rows)
        for (end, _), group in groupby(ranked, lambda one: (one[1][1], one[1][0] - one[0])):
            neighbours = [row for _, (row, _) in group]
            if end == first:
                continue
            count = max(_TOKENS_READ // (end - first), 1)
            for start in range(neighbours[0], neighbours[-1] + 1, count):
                stop = min(start + count, neighbours[-1] + 1)
                self._read_same(slice(start, stop), first, end)

    def _read_same(self, part: slice, first: int, end: int) -> None:
        """Computes keys and values of rows at the positions from `first` to `end`, exclusive."""
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
            num_text=0,
        )
