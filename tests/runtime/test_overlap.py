"""One piece ahead."""

import pytest

from ldm_jax.runtime import overlap


def test_a_call_is_dispatched_before_the_one_before_it_is_fetched():
    events = []
    for call, out in overlap.prefetch("abc", lambda x: events.append(x) or x.upper()):
        events.append((call, out))
    assert events == ["a", "b", ("a", "A"), "c", ("b", "B"), ("c", "C")]
    assert list(overlap.prefetch([], str)) == []


class Stopped(BaseException):
    """As Ctrl-C, which would end the tests too."""


def test_what_is_done_is_not_lost_with_what_fails_after_it():
    def dispatch(call):
        if call == "c":
            raise Stopped
        return call.upper()

    found = overlap.prefetch("abcd", dispatch)
    assert [next(found), next(found)] == [("a", "A"), ("b", "B")]
    with pytest.raises(Stopped):
        next(found)
