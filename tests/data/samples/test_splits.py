"""Train, validation and test documents: covered once, nested, and Megatron's split in order."""

import functools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.samples.splits import Split, split_documents, split_in_order
from megatronish.errors import DataError


def parts(split: Split) -> list[list[int]]:
    return [part.tolist() for part in (split.train, split.validation, split.test)]


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 400), validation=st.floats(0, 0.6), test=st.floats(0, 0.39))
def test_split_covers_every_document_once_and_is_never_empty_when_asked(count, validation, test):
    split = split_documents(count, validation, test)
    found = parts(split)
    assert sorted(functools.reduce(operator.iadd, found, [])) == list(range(count))
    assert all(part == sorted(part) for part in found)
    for fraction, part, room in (
        (validation, split.validation, count - 1),
        (test, split.test, count - 1 - len(split.validation)),  # validation does not give way to it
    ):
        assert (fraction > 0 and room >= 1) <= (len(part) >= 1)
        assert (fraction == 0) <= (len(part) == 0)
        assert abs(len(part) - min(count * fraction, room)) <= 1 or count == 0
    assert (count > 0) <= (len(split.train) > 0)
    assert parts(split_documents(count, validation, test)) == found


def test_larger_validation_keeps_the_smaller_one():
    small, large = (set(split_documents(1000, fraction).validation.tolist()) for fraction in (0.01, 0.1))
    assert small < large


def test_a_test_part_leaves_the_validation_part_as_it_was():
    plain, tested = split_documents(1000, 0.05), split_documents(1000, 0.05, 0.1)
    assert np.array_equal(plain.validation, tested.validation)
    assert len(tested.test) == 100
    assert set(tested.train.tolist()) == set(plain.train.tolist()) - set(tested.test.tolist())


def test_the_documents_held_out_are_pinned():
    """Golden values: held-out documents must not silently become training documents."""
    assert split_documents(40, 0.1).validation.tolist() == [19, 24, 28, 32]


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0), (1.0, 0), (float("nan"), 0), (0.5, 0.5), (0.1, -0.1)])
def test_split_fraction_outside_is_refused(validation, test):
    with pytest.raises(ValueError, match="validation fraction"):
        split_documents(10, validation, test)


def test_split_in_order_by_hand():
    assert parts(split_in_order(10, "8,1,1")) == [list(range(8)), [8], [9]]
    assert parts(split_in_order(10, "80, 20")) == [list(range(8)), [8, 9], []]
    assert parts(split_in_order(3, "1")) == [[0, 1, 2], [], []]
    assert parts(split_in_order(1000, "969,30,1"))[1:] == [list(range(969, 999)), [999]]
    assert parts(split_in_order(5, ".5,.5"))[0] == [0, 1]  # 2.5 is rounded to the even 2, as Python does
    assert parts(split_in_order(0, "1,1")) == [[], [], []]


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "0,1", "-1,2", "1;2", "1,,2", "nan", "inf,1"])
def test_bad_split_is_refused_with_an_example(text):
    with pytest.raises(DataError, match='write the shares .* "969,30,1"'):
        split_in_order(10, text)
