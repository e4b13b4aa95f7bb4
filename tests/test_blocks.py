"""Blocks of memory serve maps of their size again, and go back to the system by so many bytes."""

from __future__ import annotations

from wholegrad.run.blocks import Blocks


def given_back(blocks: Blocks, *sizes: int) -> list[int]:
    """Take blocks of these sizes, give them all back; their addresses."""
    taken = [blocks.take(size, zero=False) for size in sizes]
    for block in taken:
        blocks.give(block.fill_(7))
    return [block.data_ptr() for block in taken]


def test_a_block_serves_the_next_map_of_its_size_and_no_other() -> None:
    blocks = Blocks()
    large, small = given_back(blocks, 3 << 20, 1 << 20)
    other = blocks.take(2 << 20, zero=False)
    assert other.data_ptr() not in (large, small) and not other.any()
    again = blocks.take(3 << 20, zero=True)
    assert again.data_ptr() == large and not again.any()
    assert (blocks.take(1 << 20, zero=False) == 7).all()


def test_what_is_missing_counts_each_free_block_once() -> None:
    blocks = Blocks()
    given_back(blocks, 5, 5, 9)
    assert blocks.missing([5, 5, 9]) == 0
    assert blocks.missing([5, 5, 5, 9, 7]) == 12


def test_wanted_blocks_do_not_go() -> None:
    blocks = Blocks()
    given_back(blocks, 5, 9, 5, 9)
    blocks.shrink(0, [])
    assert blocks.missing([5, 9, 5, 9]) == 0
    blocks.shrink(1, [9, 5])  # one of each is not wanted
    assert blocks.missing([9, 5]) == 0 and blocks.missing([9, 5, 9, 5]) in (5, 9)
    blocks.shrink(1 << 30, [9, 5])
    assert blocks.missing([9, 5]) == 0 and blocks.missing([9, 5, 9, 5]) == 14
    blocks.shrink(1 << 30, [])
    assert blocks.missing([9]) == 9


def test_all_together_stay_below_what_the_plan_has() -> None:
    blocks = Blocks()
    blocks.most = 30
    given_back(blocks, 10, 20)
    used = blocks.take(4, zero=False)  # takes the place of the last one
    assert blocks.missing([10]) == 0 and blocks.missing([20]) == 20
    blocks.take(16, zero=False)
    assert blocks.missing([10]) == 0
    blocks.take(1, zero=False)
    assert blocks.missing([10]) == 10
    blocks.give(used)
    assert blocks.missing([4]) == 0
