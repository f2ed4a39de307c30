"""Refuses Parquet files that inflate to many times their size. Reads metadata; decodes nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.readers.files import check_regular

_MOST_BYTES = 2**30
"""Bytes of a column in a row group that are never too many."""
_MOST_RATIO = 100
"""Inflated over stored bytes above which more are refused. Images hardly shrink, and texts by 2 to
10."""


def check_inflated(path: Path) -> None:
    """Raises ValueError where a column in a row group of a Parquet file inflates to more than
    1 GiB and 100 times its stored size, or where the file is no regular file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_regular(path)
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):  # whoever reads the file says what is wrong
        return
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            inflated = column.total_uncompressed_size
            stored = column.total_compressed_size
            if inflated > _MOST_BYTES and inflated > _MOST_RATIO * stored:
                raise ValueError(
                    f"{path}: column {column.path_in_schema} of row group {group} inflates from "
                    f"{stored:,} to {inflated:,} bytes; if that is meant, write smaller row groups"
                )
