"""What is left out by default is no more than the marks say."""

import itertools

import pytest

from tests import thinning

pytestmark = pytest.mark.once
AXES = {"name": "abcdefg", "size": (1, 2, 3), "dtype": (["half"], ["single"])}
ROWS = [
    dict(zip(AXES, picked, strict=True))
    for picked in itertools.product(*AXES.values())
]


def test_all_pairs_of_values_meet():
    # Where some do not meet at all, too.
    for rows in (ROWS, [r for r in ROWS if (r["name"], r["size"]) != ("b", 2)]):
        chosen = [rows[i] for i in thinning.pairwise(rows)]

        def pairs(rows):
            return {
                repr(pair)
                for row in rows
                for pair in itertools.combinations(row.items(), 2)
            }

        assert pairs(chosen) == pairs(rows)
        # There are twenty-one pairs of names and sizes.
        assert len(chosen) <= 24


def test_one_value_meets_everything_and_the_others_some():
    chosen = [ROWS[i] for i in thinning.mostly(ROWS, every=4, size=3)]
    counts = {s: [v for v in chosen if v["size"] == s] for s in (1, 2, 3)}
    assert [len(counts[s]) for s in (1, 2, 3)] == [4, 4, 14]
    # Not the same ones.
    for one, other in itertools.product(counts[1], counts[2]):
        assert one | {"size": 2} != other
    assert len(thinning.mostly(ROWS, size=3)) == 14
    with pytest.raises(ValueError, match="size=5 is not in all"):
        thinning.mostly(ROWS, every=4, size=5)


def test_only_what_is_marked_is_thinned():
    def left(marks):
        return thinning.left_out([("test", marks, row) for row in ROWS])

    every = set(range(len(ROWS)))
    assert left({}) == set()
    assert left({"pairwise": {}}) == every - set(thinning.pairwise(ROWS))
    assert left({"extra": {}}) == every
    dealt = [
        [
            i
            for i in range(len(ROWS))
            if i
            not in thinning.left_out(
                [("test", {"dealt": {}}, row) for row in ROWS], backend
            )
        ]
        for backend in thinning.BACKENDS
    ]
    assert sorted(itertools.chain(*dealt)) == sorted(every)
    assert {len(own) for own in dealt} == {len(ROWS) // 3}
    few = {"every": 4, "size": 3}
    assert left({"mostly": few}) == every - set(thinning.mostly(ROWS, **few))


def test_values_are_dealt_out_with_all_of_their_combinations():
    """Whichever values the other parameters have on a backend."""
    marks = {"dealt": {"by": "name"}, "mostly": {"every": 4, "size": 3}}
    whole = thinning.mostly(ROWS, **marks["mostly"])
    for sizes in ((1, 2, 3), (1, 3)):
        rows = [row for row in ROWS if row["size"] in sizes]
        names = []
        for backend in thinning.BACKENDS:
            left = thinning.left_out(
                [("test", marks, row) for row in rows], backend
            )
            kept = [row for i, row in enumerate(rows) if i not in left]
            names.append("".join(sorted({row["name"] for row in kept})))
            if sizes == (1, 2, 3):
                assert kept == [
                    ROWS[i] for i in whole if ROWS[i]["name"] in names[-1]
                ]
        assert names == ["adg", "be", "cf"]
