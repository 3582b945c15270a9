"""Which kernel attends: the choice, and how a wrong kernel is found out."""

import warnings

import pytest
from keras import ops

import keras_ring
from keras_ring import backends, config, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Kernel
from tests.conformance import KernelConformance
from tests.kernel_choice import tensors
from tests.visits import CASES


class Other(Kernel):
    """A kernel that hands everything on, on every backend."""

    name = "other"
    description = "hands everything on"

    def __init__(self):
        self.kernel = backends.load().kernel.KERNEL
        self.visits = 0

    def available(self):
        return True

    def preferred(self, device, dtype):
        return True

    def forward(self, *arguments):
        self.visits += 1
        return self.kernel.forward(*arguments)

    def backward(self, *arguments):
        return self.kernel.backward(*arguments)

    def branch(self, *arguments):
        return self.kernel.branch(*arguments)


class Wrong(Other):
    """Its log-sum-exp of a row that sees nothing is 0."""

    name = "wrong"

    def forward(self, *arguments):
        part = super().forward(*arguments)
        zeros = ops.zeros_like(part.lse)
        return part._replace(
            lse=ops.where(ops.isinf(part.lse), zeros, part.lse)
        )


class Leaving(Wrong):
    """Wrong only where it leaves the visit to another kernel."""

    name = "leaving"

    def fits(self, inputs, visit, rows=None):
        return visit.scoring.mask is None


class Coarse(Other):
    """Its gradients are a little too large."""

    name = "coarse"

    def backward(self, *arguments):
        grads = super().backward(*arguments)
        return grads._replace(key=grads.key * 1.001)


class Raising(Other):
    """Its operation has other arguments in this release."""

    name = "raising"

    def forward(self, *arguments):
        raise TypeError("unexpected argument")


class TestReference(KernelConformance):
    """The blockwise kernel, which leaves nothing to others."""

    cases = {  # noqa: RUF012
        name: CASES[name]
        for name in ("full-cross", "causal-grouped", "padding-causal")
    }

    def make(self, fallback):
        return backends.load().kernel.KERNEL


def offer(monkeypatch, kernel):
    module = backends.load().kernel
    monkeypatch.setattr(module, "KERNELS", (kernel, module.KERNEL))
    return kernel


def test_the_first_kernel_that_agrees_is_used(automatic, monkeypatch):
    other = offer(monkeypatch, Other())
    assert selection.choose("float32") is other
    visits = other.visits
    keras_ring.ops.ring_attention(*tensors(), mask=masks.Causal())
    assert other.visits > visits


def test_visits_that_a_kernel_leaves_to_others_need_no_proof(
    automatic, monkeypatch
):
    leaving = offer(monkeypatch, Leaving())
    assert selection.choose("float32") is leaving
    assert leaving.visits == 1


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (Wrong, "its lse of causal attention differs"),
        (Coarse, "its dk of full attention differs"),
        (Raising, "it raised TypeError: unexpected argument"),
    ],
)
def test_a_kernel_that_does_not_agree_is_not(
    kernel, why, automatic, monkeypatch
):
    """And says so once."""
    kernel = offer(monkeypatch, kernel())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            keras_ring.ops.ring_attention(*tensors(), mask=masks.Causal())
    device = kernel.kernel.device(tensors()[0])
    assert selection.choose("float32", device) is kernel.kernel
    found = [w for w in found if w.category is RuntimeWarning]
    assert len(found) == 1
    assert why in str(found[0].message)
    assert f"{kernel.name!r} is not used" in str(found[0].message)


def test_a_kernel_that_is_named_is_used_as_it_is(automatic, monkeypatch):
    wrong = offer(monkeypatch, Wrong())
    config.set_kernel("wrong")
    assert config.kernel() == "wrong"
    assert selection.choose("float32") is wrong
    config.set_kernel("blockwise")
    assert selection.choose("float32") is backends.load().kernel.KERNEL


def test_names_that_are_not_there_are_refused(automatic):
    assert config.kernel() == "auto"
    with pytest.raises(ValueError, match=r"'auto'.*'blockwise'") as error:
        config.set_kernel("fastest")
    assert "name='fastest'" in str(error.value)
    assert config.kernel() == "auto"


def test_the_kernels_describe_themselves(automatic, monkeypatch):
    offer(monkeypatch, Other())
    found = config.kernels()
    assert found["other"] == "hands everything on"
    assert list(found) == ["other", "blockwise"]
    monkeypatch.setattr(Other, "available", lambda self: False)
    assert list(config.kernels()) == ["blockwise"]


def check_summary(name):
    config.set_kernel(name)
    lines = []
    try:
        keras_ring.DistributedStrategy(1, 1).summary(print_fn=lines.append)
    finally:
        config.set_kernel("auto")
    device = backends.load().kernel.KERNEL.device(tensors()[0])
    best = next(
        kernel.name
        for kernel in backends.load().kernel.KERNELS
        if kernel.preferred(device, "float32")
    )
    want = best if name == "auto" else name
    assert f"  kernel             {want}" in lines


@pytest.mark.parametrize("name", ["auto", "blockwise"])
def test_summary_names_the_kernel_in_use(name, on_devices):
    on_devices(1, check_summary, name)
