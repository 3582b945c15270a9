"""What the benchmarks calculate; what they measure is never asserted."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import (
    context_table,
    kernels,
    overlap,
    schedule,
    timing,
    tpu_aot,
)
from keras_ring import masks

pytestmark = pytest.mark.once
# A loop body that hides one transfer behind a product in a branch, and waits
# for the other at once.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%products (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0:T(8,128)} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0:T(8,128)} convolution(%p, %p), dim_labels=bf_io->bf
}

%nothing (q: f32[8,8]) -> f32[8,8] {
  ROOT %q = f32[8,8]{1,0:T(8,128)} parameter(0)
}

%body (carry: (bf16[2,8], f32[8,8])) -> (bf16[2,8], f32[8,8]) {
  %chunk = bf16[2,8]{1,0} parameter(0)
  %start = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[2,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%chunk), channel_id=1
  %conditional.2 = (f32[8,8]{1,0}) conditional(%index, %a, %b), branch_computations={%products, %nothing}
  %done = bf16[2,8]{1,0} collective-permute-done(%start), metadata={op_name="jit(step)/transpose(jvp(attention))/ppermute"}
  %start.1 = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%x), channel_id=2
  %done.1 = f32[8,8]{1,0} collective-permute-done(%start.1), metadata={op_name="jit(step)/jvp(attention)/ppermute"}
  %ppermute.3 = f32[4,8]{1,0} collective-permute(%y), channel_id=3, metadata={op_name="jit(step)/jvp(attention)/ppermute"}
  ROOT %tuple = (bf16[2,8]{1,0}, f32[8,8]{1,0}) tuple(%done, %done.1)
}
"""  # noqa: E501


def test_a_schedule_tells_what_hides_a_transfer():
    hidden, exposed, synchronous = schedule.transfers(PROGRAM)
    assert (hidden.dtype, hidden.bytes, hidden.products) == ("bf16", 32, 1)
    assert hidden.hides_behind == "a visit"
    assert hidden.where == "backward, each hop"
    assert (exposed.dtype, exposed.bytes, exposed.products) == ("f32", 256, 0)
    assert exposed.hides_behind == "nothing"
    assert exposed.where == "forward, each hop"
    assert (synchronous.bytes, synchronous.products) == (128, 0)
    assert synchronous.hides_behind == schedule.SYNCHRONOUS


def test_a_loop_of_chips_closes_over_neighbours():
    devices = [
        SimpleNamespace(coords=(x, y, 0)) for y in range(4) for x in range(6)
    ]
    ring = [device.coords for device in tpu_aot.neighbours(devices)]
    assert sorted(ring) == sorted(device.coords for device in devices)
    for here, there in zip(ring, [*ring[1:], ring[0]], strict=True):
        assert sum(abs(a - b) for a, b in zip(here, there, strict=True)) == 1
    with pytest.raises(ValueError, match="even number of rows"):
        tpu_aot.neighbours(devices[:18])


def test_a_program_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match="must be scheduled"):
        schedule.transfers(PROGRAM.replace("is_scheduled=true", ""))


@pytest.mark.parametrize(
    "bytes_of",
    [
        lambda length: 5e7 + 2e4 * length,
        lambda length: 5e7 + 96.0 * length**2,
        lambda length: 9e8 + length,
    ],
    ids=["linear", "quadratic", "flat"],
)
def test_the_longest_length_fits_and_the_next_does_not(bytes_of):
    length, need = context_table.longest(bytes_of, 2**30)
    after = context_table.length_at(context_table.place_at(length) + 1)
    assert need == bytes_of(length) <= 2**30 < bytes_of(after)
    assert context_table.longest(bytes_of, 1e7) is None


@pytest.mark.parametrize("kind", ["contiguous", "balanced"])
def test_members_share_all_tiles_of_a_causal_mask(kind):
    from benchmarks import virtual

    size, length = 4, 4096
    held = [virtual.spans(kind, index, size, length) for index in range(size)]
    covered = [np.arange(s, s + n) for own in held for s, n in own]
    assert sorted(np.concatenate(covered)) == list(range(length))
    work = [
        sum(
            virtual.tiles(kind, index, source, size, length, masks.Causal())
            for source in virtual.visits(
                kind, index, size, length, masks.Causal()
            )
        )
        for index in range(size)
    ]
    tiles = length // virtual.TILE
    assert sum(work) == tiles * (tiles + 1) // 2
    assert (len(set(work)) == 1) == (kind == "balanced")


def test_a_transfer_is_hidden_while_attention_is_computed():
    found = [
        ["forward", 0, 0.0, 10.0],
        ["recv", 64, 2.0, 12.0],
        ["send", 64, 2.0, 12.0],
        ["backward", 0, 11.0, 30.0],
        ["recv", 32, 31.0, 35.0],
    ]
    assert overlap.transfers(found) == [
        (64, 2.0, 12.0, 9.0),
        (32, 31.0, 35.0, 0.0),
    ]


def test_a_profile_without_attention_is_refused():
    def event(name):
        place = SimpleNamespace(start=1.0, end=2.0)
        return SimpleNamespace(name=name, time_range=place, input_shapes=[[4]])

    computed = event("aten::_scaled_dot_product_flash_attention_for_cpu")
    moved = event("gloo:recv")
    assert overlap.spans([computed, moved]) == [
        ["forward", 0, 0.0, 1.0],
        ["recv", 4, 0.0, 1.0],
    ]
    for events in [], [computed], [moved]:
        with pytest.raises(ValueError, match="see attention and transfers"):
            overlap.spans(events)


def test_rings_of_accelerators_are_those_asked_for(monkeypatch):
    monkeypatch.setattr(timing, "accelerators", lambda backend: 4)
    assert timing.sizes("jax", None, (1, 8), simulated=False) == ((2, 4), False)
    assert timing.sizes("jax", [3], (1, 8), simulated=False) == ((3,), False)
    assert timing.sizes("jax", [8], (1, 8), simulated=True) == ((8,), True)
    assert timing.sizes("jax", None, (1, 8)) == ((1, 8), True)
    with pytest.raises(ValueError, match="with 4 accelerators"):
        timing.sizes("jax", [8], (1, 8), simulated=False)


def test_kernels_are_measured_by_name():
    kernel = SimpleNamespace(
        name="triton",
        preferred=lambda device, dtype: False,
        available=lambda: True,
    )
    assert not kernels._wanted(kernel, "cuda", "float32", None)
    assert kernels._wanted(kernel, "cuda", "float32", ["triton"])
    assert not kernels._wanted(kernel, "cuda", "float32", ["fused"])


def test_contestants_take_turns_and_ratios_are_paired():
    calls = []
    times = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"}, 2
    )
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(own) for name, own in times.items()} == {"a": 2, "b": 2}
    assert timing.ratio([2.0, 9.0, 30.0], [1.0, 3.0, 10.0]) == 3.0
