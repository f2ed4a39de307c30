"""Rows of instruction tuning -> rows with a caption: the first answer of a conversation about an
image. Knows rows as JSON has them; opens nothing.

LLaVA (Liu et al. 2023, arXiv:2304.08485) has `conversations` of `from` and `value`; chat formats
have `messages` of `role` and `content`.
"""

from __future__ import annotations

from pipeline.data.readers.base import Record

_TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_ANSWERS = ("gpt", "assistant", "model")
_CAPTIONS = ("text", "txt", "caption", "captions")
"""Columns beside which a conversation is not asked for a caption."""


def conversation_column(columns: list[str]) -> str | None:
    """The column of conversations, where they alone hold captions."""
    if set(columns) & set(_CAPTIONS):
        return None
    return next((name for name in _TURNS if name in columns), None)


def with_first_answer(row: Record, column: str) -> Record:
    """A row whose conversation is replaced by `text`, its first answer; None where it has none."""
    rest = {name: value for name, value in row.items() if name != column}
    return rest | {"text": _first_answer(row.get(column), *_TURNS[column])}


def _first_answer(turns: object, speaker: str, said: str) -> str | None:
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get(speaker) in _ANSWERS:
            answer = turn.get(said)
            return answer if isinstance(answer, str) else None
    return None
