"""One piece ahead."""

from ldm_jax.runtime import overlap


def test_a_call_is_dispatched_before_the_one_before_it_is_fetched():
    events = []
    for call, out in overlap.prefetch("abc", lambda x: events.append(x) or x.upper()):
        events.append((call, out))
    assert events == ["a", "b", ("a", "A"), "c", ("b", "B"), ("c", "C")]
    assert list(overlap.prefetch([], str)) == []
