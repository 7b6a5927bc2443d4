"""A method that is called through ours is its owner's own again afterwards, whoever else wrapped it."""

from __future__ import annotations

import copy

import pytest

from lib_xadapter.wrapping import copies_unwrapped, wrapped


class Owner:
    def method(self, number: int) -> int:
        return number


def tenfold(host, number: int) -> int:
    return 10 * host(number)


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_a_call_goes_through_the_wrapper(owner):
    with wrapped(owner, "method", tenfold):
        assert owner.method(1) == 10
    assert owner.method(1) == 1
    assert vars(owner) == {}


def test_what_somebody_else_put_there_is_called_and_put_back(owner):
    owner.method = theirs = lambda number: number + 1
    with wrapped(owner, "method", tenfold):
        assert owner.method(1) == 20
    assert owner.method is theirs


def test_who_wraps_it_meanwhile_stays_and_calls_the_owners_own(owner):
    with wrapped(owner, "method", tenfold):
        ours = owner.method
        owner.method = lambda number: ours(number) + 1
        assert owner.method(1) == 11
    assert owner.method(1) == 2


def test_it_is_put_back_after_an_error(owner):
    with pytest.raises(ValueError), wrapped(owner, "method", tenfold):
        raise ValueError
    assert owner.method(1) == 1


class TestCopies:
    """A copy made while the owner is wrapped is as the owner was, and the owner goes on as it is."""

    def test_a_copy_has_its_own_method(self, owner):
        owner.number = 3
        with copies_unwrapped(owner), wrapped(owner, "method", tenfold):
            copied = copy.copy(owner)
            assert copied.method(1) == 1
            assert owner.method(1) == 10
        assert vars(copied) == vars(owner) == {"number": 3}

    def test_what_somebody_else_put_there_before_is_copied(self, owner):
        owner.method = theirs = lambda number: number + 1
        with copies_unwrapped(owner), wrapped(owner, "method", tenfold), wrapped(owner, "method", tenfold):
            assert copy.copy(owner).method is theirs

    def test_afterwards_it_is_copied_as_any_object(self, owner):
        with copies_unwrapped(owner):
            pass
        owner.number = 3
        assert vars(copy.copy(owner)) == {"number": 3}
