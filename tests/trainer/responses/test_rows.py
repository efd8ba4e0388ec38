from __future__ import annotations

import torch

from trainer.responses.rows import collate

QUERIES = [torch.tensor([1, 2, 3]), torch.tensor([4])]
RESPONSES = [torch.tensor([7]), torch.tensor([8, 9, 10, 11])]
CPU = torch.device("cpu")


def test_padded_rows_are_filled_on_the_right_and_lack_the_token_that_nothing_depends_on() -> None:
    rows = collate(QUERIES, RESPONSES, packed=False, pad_id=99, device=CPU)
    assert rows.input_ids.tolist() == [[1, 2, 3, 99], [4, 8, 9, 10]]
    assert rows.attention_mask is not None
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.where.tolist() == [2, 4, 5, 6, 7]
    assert rows.first == 0


def test_packed_rows_follow_each_other_and_count_their_positions_anew() -> None:
    rows = collate(QUERIES, RESPONSES, packed=True, pad_id=99, device=CPU)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 8, 9, 10]]
    assert rows.position_ids is not None
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert rows.where.tolist() == [2, 3, 4, 5, 6]
    assert rows.packed is not None
    assert rows.packed.slots.tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_what_is_said_of_each_token_goes_back_to_its_row() -> None:
    rows = collate(QUERIES, RESPONSES, packed=True, pad_id=99, device=CPU)
    values = torch.arange(1.0, 6.0)
    assert rows.tokens.tolist() == [7, 8, 9, 10, 11]
    assert rows.mask.tolist() == [[True, False, False, False], [True, True, True, True]]
    assert rows.padded(values).tolist() == [[1, 0, 0, 0], [2, 3, 4, 5]]
    assert [row.tolist() for row in rows.unpacked(values)] == [[1], [2, 3, 4, 5]]
