"""Which combinations of parameters run by default; `--all` runs every one.

Marks beside `pytest.mark.parametrize` say how a test may be thinned:

- `pytest.mark.pairwise`: every two values of two parameters that meet in
  some combination meet in one that runs.
- `pytest.mark.mostly(name=value, every=n)`: of the parameter `name`, `value`
  runs with all combinations of the others, and each other value with every
  n-th of them, beginning at another one each; with none where `every` is not
  given.
- `pytest.mark.extra`, of one combination (`pytest.param(..., marks=...)`): it
  runs with `--all` alone.
- `pytest.mark.dealt`: what is left is dealt out among the backends, one to each
  in turn, for code that all of them share; `dealt(tests=True)` does so with
  the tests of a class. `dealt(by=name)` deals out the values of a parameter,
  each with all that is left of its combinations: so they go to the same
  backend whichever values the others have on each.

What runs is decided by the order in which parameters are written down, so it
is the same each time and on each worker. A test that is named by its id
(`file.py::test`) is not thinned.
"""

import itertools
import os

import pytest

# They share what is dealt out, in this order.
BACKENDS = ("jax", "tensorflow", "torch")


def extra_on(*backends):
    """The mark `extra` on some backends: where one combination takes long and
    another shows the same. None elsewhere."""
    here = os.environ["KERAS_BACKEND"] in backends
    return [pytest.mark.extra] if here else []


def left_out(tests, backend="jax"):
    """Places of what is thinned out.

    Args:
        tests: list of `(test, marks, values)`: what the combinations of one
            test share (hashable), a dictionary of its marks' keyword
            arguments by name, and the values of its parameters by name.
        backend: the one that runs, of `BACKENDS`.

    Returns:
        Set of places in `tests`.
    """
    first, step = BACKENDS.index(backend), len(BACKENDS)
    groups: dict = {}
    for place, (test, *_) in enumerate(tests):
        groups.setdefault(test, []).append(place)
    left: set[int] = set()
    for places in groups.values():
        left.update(place for place in places if "extra" in tests[place][1])
        marks = tests[places[0]][1]
        rows = [tests[place][2] for place in places]
        if "pairwise" in marks:
            kept = pairwise(rows)
        elif "mostly" in marks:
            kept = mostly(rows, **marks["mostly"])
        else:
            kept = range(len(rows))
        left.update(set(places) - {places[i] for i in kept})
        if "by" in marks.get("dealt", {}):
            order = turns(rows, marks["dealt"]["by"])
            left.update(
                place
                for place, turn in zip(places, order, strict=True)
                if turn % step != first
            )
    dealt: dict = {}
    for place, (test, marks, _) in enumerate(tests):
        if place not in left and "by" not in marks.get("dealt", {"by": None}):
            together = marks["dealt"].get("tests", False)
            dealt.setdefault(test[0] if together else test, []).append(place)
    for places in dealt.values():
        left.update(set(places) - set(places[first::step]))
    return left


def turns(rows, name):
    """For each row how many other values of a parameter came before its."""
    found: dict = {}
    return [found.setdefault(row[name], len(found)) for row in numbered(rows)]


def numbered(rows):
    """The rows with a number in place of each value: values need not be
    hashable, nor comparable."""
    found: dict = {}
    return [
        {
            name: found.setdefault((name, id(value)), len(found))
            for name, value in row.items()
        }
        for row in rows
    ]


def pairwise(rows):
    """Places of rows in which all pairs of values meet that meet in any.

    Args:
        rows: list of dictionaries of values by name, all of the same names.
    """
    pairs = [
        set(itertools.combinations(row.items(), 2)) for row in numbered(rows)
    ]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        # The first of those that bring the most.
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def mostly(rows, every=None, **main):
    """Places of rows with the main value, and of every n-th of the others.

    Args:
        rows: list of dictionaries of values by name, all of the same names.
        every: how many combinations of the other parameters another value
            goes on after each that it runs with; None for never.
        **main: the parameter's name and its main value.
    """
    ((name, value),) = main.items()
    others: dict = {}
    combinations: dict = {}
    chosen, met = [], 0
    for place, row in enumerate(numbered(rows)):
        own = row.pop(name)
        rest = combinations.setdefault(tuple(row.values()), len(combinations))
        if rows[place][name] == value:
            chosen.append(place)
            met += 1
            continue
        turn = others.setdefault(own, len(others))
        if every and rest % every == turn % every:
            chosen.append(place)
    if met < len(combinations):
        raise ValueError(f"{name}={value!r} is not in all combinations")
    return chosen
