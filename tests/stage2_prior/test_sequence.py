"""The stream's offsets, targets and slots, by hand."""

from __future__ import annotations

import pytest
import torch

from stage2_prior import Level, Stream, StreamConfig

TWO = StreamConfig(
    text_vocab_size=10,
    text_length=4,
    levels=(Level(grid=(1, 2), num_codes=5), Level(grid=(2, 2), num_codes=7)),
)


def test_inputs_shift_codes_past_the_text_vocabulary_and_earlier_levels():
    stream = Stream(TWO)
    ids = stream.inputs(torch.tensor([[1, 3, 2, 0]]), torch.tensor([[0, 4, 0, 6, 1]]))
    assert ids.tolist() == [[1, 3, 2, 0, 10, 14, 15, 21, 16]]
    assert stream.vocab_size == 22 and stream.length == 10


def test_code_ids_of_a_single_later_position_use_its_level():
    assert Stream(TWO).code_ids(torch.tensor([[3]]), torch.tensor([4])).tolist() == [[18]]


def test_image_targets_count_over_levels():
    stream = Stream(TWO)
    assert stream.image_targets(torch.tensor([[0, 4, 0, 6, 1, 2]])).tolist() == [
        [0, 4, 5, 11, 6, 7]
    ]
    assert stream.within_level(
        torch.tensor([[0, 4, 5, 11]]), torch.tensor([[0, 1, 2, 5]])
    ).tolist() == [[0, 4, 0, 6]]


def test_each_position_has_the_classes_of_its_own_level_only():
    outside = Stream(TWO).outside_level(torch.tensor([[0, 3]]))
    assert outside is not None
    assert outside[0, 0].tolist() == [False] * 5 + [True] * 7
    assert outside[0, 1].tolist() == [True] * 5 + [False] * 7
    one = Stream(
        StreamConfig(text_vocab_size=9, text_length=3, levels=(Level(grid=(2, 2), num_codes=5),))
    )
    assert one.outside_level(torch.tensor([0])) is None


def test_text_targets_end_at_the_end_token_and_skip_null_captions():
    stream = Stream(TWO)
    targets = stream.text_targets(torch.tensor([[1, 3, 2, 0], [1, 2, 0, 0]]))
    assert targets.tolist() == [[3, 2, -100], [-100, -100, -100]]


def test_null_caption_is_start_end_pads():
    assert Stream(TWO).null_caption(2).tolist() == [[1, 2, 0, 0]] * 2


def test_coordinates_of_a_coarse_level_lie_amid_the_fine_codes():
    config = StreamConfig(
        text_vocab_size=9,
        text_length=3,
        levels=(Level(grid=(1, 1), num_codes=5), Level(grid=(2, 2), num_codes=5)),
    )
    coordinates = Stream(config).coordinates()
    assert coordinates[:3].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert coordinates[3].tolist() == [3.5, 3.5]
    assert coordinates[4:].tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]


def test_a_stream_without_levels_or_text_is_refused():
    with pytest.raises(ValueError, match="at least one level"):
        StreamConfig(text_vocab_size=9, text_length=4)
    with pytest.raises(ValueError, match=r"text\.max_length is 2"):
        StreamConfig(text_vocab_size=9, text_length=2, levels=(Level(grid=(2, 2), num_codes=5),))
