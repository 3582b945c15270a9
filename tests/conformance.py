"""The contract of kernels, for the tests of each of them to subclass."""

import numpy as np
import pytest
from keras import ops

from keras_ring.attention import numerics
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.masks import Causal
from tests.visits import CheckedVisit, Refusing

OPTIONS = {
    "in-a-ring": {"rest": 40},
    "lse-has-a-gradient": {"pull": True},
}


class KernelConformance:
    """What `keras_ring.attention.kernel.Kernel` promises, against the oracle.

    A subclass, named `Test...`, says `make` and the attributes.

    Attributes:
        cases: by name, what the kernel computes itself.
        first: names of the cases that run without `--all`; None for all.
        left: by name, what it leaves to its fallback.
        tolerance: largest errors by dtype, where they are not the usual ones.
        dtype: of the small blocks of the other tests.
    """

    cases: dict = {}  # noqa: RUF012
    first: tuple | None = None
    left: dict = {}  # noqa: RUF012
    tolerance: dict = {}  # noqa: RUF012
    dtype = "float32"

    def make(self, fallback):
        """The kernel, with another behind it."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            first = self.cases if self.first is None else self.first
            assert set(first) <= set(self.cases)
            metafunc.parametrize(
                "case",
                [
                    name
                    if name in first
                    else pytest.param(name, marks=pytest.mark.extra)
                    for name in self.cases
                ],
            )
        if "other" in metafunc.fixturenames:
            metafunc.parametrize("other", self.left or [None])

    def small(self, starts=(0, 0)):
        """A causal block with a length that no tile divides."""
        draw = np.random.default_rng(0)
        inputs = Inputs(
            *(
                ops.convert_to_tensor(
                    draw.normal(size=(1, heads, 130, 16)), self.dtype
                )
                for heads in (2, 1, 1)
            )
        )
        scoring = Scoring(scale=0.25, mask=Causal())
        return inputs, Visit((starts[0],), (starts[1],), scoring)

    def close(self, have, want):
        limit = self.tolerance.get(self.dtype, 2e-5)
        have, want = (
            ops.convert_to_numpy(ops.cast(t, "float32")) for t in (have, want)
        )
        np.testing.assert_allclose(have, want, limit, limit)

    @pytest.mark.mostly(options="in-a-ring", every=3)
    @pytest.mark.parametrize("options", OPTIONS)
    def test_a_block_is_exact(self, case, options):
        found = self.cases[case]
        CheckedVisit(found, **OPTIONS[options]).check(
            self.make(Refusing()), self.tolerance.get(found.dtype)
        )

    def test_what_does_not_fit_is_left_to_the_fallback(self, other):
        if other is None:
            return  # A kernel that takes everything.
        visit = CheckedVisit(self.left[other])
        kernel = self.make(Refusing())
        assert not kernel.fits(visit.inputs, visit.visit)
        with pytest.raises(AssertionError, match="not fused"):
            visit.check(kernel)

    def test_it_says_what_it_is(self):
        kernel = self.make(Refusing())
        assert kernel.name.isidentifier()
        assert kernel.description
        assert kernel.available() in (True, False)
        assert isinstance(kernel.reason(), str)
        for device in (None, "cpu", "an unknown device"):
            assert kernel.preferred(device, self.dtype) in (True, False)
        assert isinstance(kernel.rounds(self.dtype), bool)

    def test_blocks_add_up(self):
        """The carry of a first block and of a later one, which sees less."""
        kernel = self.make(Refusing())
        inputs, first = self.small((130, 0))
        second = self.small((130, 130))[1]
        parts = [kernel.forward(inputs, v, None) for v in (first, second)]
        wanted = numerics.merge(*parts)
        carry = kernel.forward(inputs, first, None)
        found = kernel.forward(inputs, second, carry)
        self.close(found.out, wanted.out)
        self.close(found.lse, wanted.lse)
        pull = ops.cast(wanted.out, self.dtype)
        delta = kernel.row_delta(wanted.out, pull, ops.zeros_like(wanted.lse))
        rows = Rows(wanted.out, wanted.lse, delta, pull)
        shares = [
            kernel.backward(inputs, rows, v, None) for v in (first, second)
        ]
        wanted = shares[0].query + shares[1].query
        again = kernel.backward(inputs, rows, first, None)
        found = kernel.backward(inputs, rows, second, again.query)
        self.close(found.query, wanted)
        self.close(found.key, shares[1].key)
        self.close(found.value, shares[1].value)

    def test_a_block_without_pairs_changes_nothing(self):
        kernel = self.make(Refusing())
        inputs, visit = self.small((0, 0))
        _, later = self.small((0, 130))
        part = kernel.forward(inputs, later, None)
        assert not ops.convert_to_numpy(part.out).any()
        assert np.isneginf(ops.convert_to_numpy(part.lse)).all()
        want = kernel.forward(inputs, visit, None)
        have = kernel.forward(
            inputs, later, kernel.forward(inputs, visit, None)
        )
        self.close(have.out, want.out)
        self.close(have.lse, want.lse)
