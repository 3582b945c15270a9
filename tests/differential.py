"""Random attention problems, on random rings, against the oracle.

A *program* is what has to be compiled: shapes, ring, mask, dtype, options.
A *case* is a program with one draw of data: values and their magnitudes,
padding, documents, lengths of prefixes, seeds. Both follow from integers
alone, so that three numbers name a case; `python -m tests.fuzz` repeats it.
"""

import contextlib
import dataclasses
import os
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_ring
from keras_ring import config, masks
from keras_ring.attention.blockwise import tiles
from keras_ring.distribution import placement
from tests import reference, rounding, worlds
from tests.gradients import vjp

# (data_parallel, sequence_parallel); three and more members are where
# errors of the backward's rotation show.
MESHES = [
    *((1, size) for size in (1, 2, 3, 4, 8)),
    *((2, 1), (2, 2), (2, 4)),
]
# (queries, keys): some that rings split, some shorter than a ring, some that
# are padded inside.
LENGTHS = [(24, 24), (48, 48), (24, 48), (48, 24), (96, 96), (24, 120)]
LENGTHS += [(1, 1), (7, 7), (3, 40), (23, 50), (50, 7), (7, 8), (97, 97)]
# For the fused kernels' rectangles.
LONG = [(528, 528), (600, 312)]
# (heads, key_heads).
HEADS = [(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]
# (head_dim, value_dim).
DIMS = [(8, 8), (16, 16), (8, 4), (4, 12), (32, 32)]
DTYPES = ["float32"] * 4 + ["float64", "bfloat16", "bfloat16", "float16"]
# Positions of a tile; the package's own holds most chunks of here whole.
TILES = [16, 64, tiles.TILE]
# Positions that travel together, where the backend cuts what travels (None is
# for its own number, more than there are here).
PORTIONS = [None, 5, 16] if keras.backend.backend() == "torch" else [None]
SCALES = [None, None, None, 0.7, 0.05, -0.3]

# The bound leaves out terms of second order and the odd operation.
SAFETY = 4.0
# Smaller numbers than these are flushed to zero, or have few bits.
SMALLEST = {
    "float64": 1e-290,
    "float32": 1e-30,
    "bfloat16": 1e-30,
    "float16": 2.0**-23,
}
LARGEST = {"float16": 65504.0}
# Products of this size and more: the softmax takes the largest.
LOGITS = [0.1, 1.0, 1.0, 1.0, 5.0, 30.0, 1e3, 1e5]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled once; `mask` is a tree of tuples such as
    `("and", ("causal",), ("padding", 0))`."""

    mesh: tuple[int, int]
    batch: int
    lengths: tuple[int, int]
    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: str
    mask: tuple | None
    scale: float | None
    soft_cap: float | None
    alibi: bool
    sinks: bool
    bias: tuple[bool, bool] | None
    dropout: float
    return_lse: bool
    balance: bool | str
    tile: int
    kernel: str
    portion: int | None = None
    attention: str = "ring"

    @property
    def devices(self):
        return self.mesh[0] * self.mesh[1]


def generator(*numbers):
    """Random numbers that follow from some integers."""
    return np.random.default_rng(np.random.SeedSequence(numbers))


def draw_program(seed, number, attention=None):
    """Program `number` of a run with this seed, on the devices there are.

    Args:
        seed, number: integers.
        attention: the way to share the sequence; one that its heads allow
            if None.
    """
    draw = generator(seed, number)

    def one_of(values):
        return values[int(draw.integers(len(values)))]

    def chance(probability):
        return bool(draw.random() < probability)

    mesh = one_of([m for m in MESHES if m[0] * m[1] <= worlds.DEVICES])
    long = chance(0.1)
    lengths = one_of(LONG if long else LENGTHS)
    heads = (2, 1) if long else one_of(HEADS)
    # A padded row would give its gradient to what all rows share.
    batch = mesh[0] * (1 if long else int(draw.integers(1, 4)))
    one_row = mesh[0] == 1 and chance(0.5)
    return Program(
        mesh=mesh,
        batch=batch,
        lengths=lengths,
        heads=heads,
        dims=one_of(DIMS),
        dtype=one_of(DTYPES),
        mask=draw_mask(draw, one_of, heads[0], lengths),
        scale=one_of(SCALES),
        soft_cap=one_of([None, None, 5.0, 30.0]),
        alibi=chance(0.3),
        sinks=chance(0.3),
        bias=(one_row, chance(0.5)) if chance(0.3) else None,
        dropout=one_of([0.0, 0.0, 0.1, 0.5]),
        return_lse=chance(0.6),
        balance=one_of(["auto", True, True]),
        tile=one_of(TILES[1:] if long else TILES),
        kernel=one_of(["auto", "auto", "blockwise"]),
        portion=one_of([p and 10 * p for p in PORTIONS] if long else PORTIONS),
        attention=one_of(ways(mesh[1], heads[0]))
        if attention is None
        else attention,
    )


def ways(size, heads):
    """The ways to share a sequence that are there for a number of heads."""
    found = ["ring", "all_gather", "auto"]
    if heads % size == 0:
        found.append("all_to_all")
    if any(size % n == heads % n == 0 for n in range(2, size)):
        found.append("mixed")
    return found


def draw_mask(draw, one_of, heads, lengths):
    """A tree of up to three masks, or None."""
    kinds = ["causal", "causal", "window", "padding", "segments"]
    kinds += ["prefix", "prefixes", "blocks", "pairs"]
    tree = None
    for slot in range(int(draw.integers(4))):
        kind = one_of(kinds)
        leaf: tuple = (kind,)
        if kind in ("window", "blocks"):
            leaf = (kind, one_of([1, 3, 7, 16, 30, max(lengths)]))
        elif kind == "prefix":
            leaf = (kind, int(draw.integers(lengths[1] + 2)))
        elif kind == "pairs":
            leaf = (kind, slot, one_of([1, heads]))
        elif kind != "causal":
            leaf = (kind, slot)
        tree = (
            leaf if tree is None else (one_of(["and", "and", "or"]), tree, leaf)
        )
    return tree


def leaves(tree):
    """The masks of a tree, from left to right."""
    if tree is None:
        return []
    if tree[0] in ("and", "or"):
        return leaves(tree[1]) + leaves(tree[2])
    return [tree]


def draw_case(program, seed, number, case):
    """The arrays of a case by name, in the order in which they are passed.

    Floating-point ones are rounded to the program's dtype. Scalars of one
    head or one seed are numbers of their own, because an array of rank 1
    would be split over the batch.
    """
    draw = generator(seed, number, case)
    (queries, keys), (heads, key_heads) = program.lengths, program.heads
    batch, (depth, width) = program.batch, program.dims

    def normal(*shape):
        return draw.standard_normal(shape)

    data: dict[str, Any] = {
        "query": normal(batch, queries, heads, depth),
        "key": normal(batch, keys, key_heads, depth),
        "value": normal(batch, keys, key_heads, width),
        "grad_out": normal(batch, queries, heads, width),
    }
    if draw.random() < 0.1:
        data["key"][:] = data["key"][:, :1]  # All scores of a row are equal.
    if draw.random() < 0.1:
        data["value"] *= 100
    scale = depth**-0.5 if program.scale is None else program.scale
    target = LOGITS[int(draw.integers(len(LOGITS)))]
    largest = (
        abs(scale)
        * np.abs(
            reference.pairs(
                data["query"], np.repeat(data["key"], heads // key_heads, 2)
            )
        ).max()
    )
    for name in ("query", "key"):
        data[name] *= np.sqrt(target / largest)
    if program.return_lse:
        data["grad_lse"] = normal(batch, queries, heads)
    if program.bias is not None:
        shape = (
            1 if program.bias[0] else batch,
            queries,
            1 if program.bias[1] else heads,
            keys,
        )
        data["bias"] = normal(*shape) * [0.5, 3.0, 1e3][draw.integers(3)]
        if draw.random() < 0.4:
            data["bias"][draw.random(shape) < 0.3] = -np.inf
            data["bias"][:, : queries // 4] = -np.inf
    if program.alibi:
        for head in range(heads):
            data[f"slope{head}"] = normal() * [0.1, 1.0][draw.integers(2)]
    if program.sinks:
        for head in range(heads):
            data[f"sink{head}"] = normal() * [1.0, 20.0][draw.integers(2)]
    data = {k: rounding.rounded(v, program.dtype) for k, v in data.items()}
    if program.dropout:
        for half in range(2):
            data[f"seed{half}"] = np.int32(draw.integers(-(2**31), 2**31))
    for leaf in leaves(program.mask):
        data.update(draw_mask_arrays(draw, program, leaf))
    return data


def draw_mask_arrays(draw, program, leaf):
    """What a mask carries."""
    kind, slot = leaf[0], leaf[1] if len(leaf) > 1 else None
    batch, (queries, keys) = program.batch, program.lengths
    if kind == "padding":
        rows = [draw_valid(draw, keys, program.mesh[1]) for _ in range(batch)]
        return {f"valid{slot}": np.stack(rows)}
    if kind == "segments":
        key_ids = np.stack([draw_documents(draw, keys) for _ in range(batch)])
        query_ids = key_ids
        if queries != keys or draw.random() < 0.3:
            rows = [draw_documents(draw, queries) for _ in range(batch)]
            query_ids = np.stack(rows)
        return {f"query_ids{slot}": query_ids, f"key_ids{slot}": key_ids}
    if kind == "prefixes":
        lengths = draw.integers(0, keys + 3, batch).astype("int32")
        return {f"prefixes{slot}": lengths}
    if kind == "pairs":
        shape = (batch, queries, leaf[2], keys)
        density = [0.0, 0.1, 0.6, 1.0][draw.integers(4)]
        pairs = draw.random(shape) < density
        pairs[:, draw.random(queries) < 0.2] = False
        return {f"pairs{slot}": pairs}
    return {}


def draw_valid(draw, keys, ring):
    """Which keys of one sample are real."""
    valid = np.zeros(keys, bool)
    cut = int(draw.integers(keys + 1))
    match int(draw.integers(7)):
        case 0:
            valid[:] = True
        case 1:
            pass
        case 2:
            valid = draw.random(keys) < 0.6
        case 3:
            valid[:cut] = True
        case 4:
            valid[cut:] = True
        case 5:
            valid[cut % keys] = True
        case 6:  # One shard is all padding.
            chunk = -(-keys // ring)
            start = chunk * int(draw.integers(ring))
            valid[:] = True
            valid[start : start + chunk] = False
    return valid


def draw_documents(draw, length):
    """The document of each position: some of one token, ids that skip."""
    ends = draw.random(length) < [0.05, 0.2, 1.0][draw.integers(3)]
    steps = ends * draw.integers(1, 3, length)
    return np.cumsum(steps).astype("int32")


def as_mask(tree, data):
    """The package's mask."""
    if tree is None:
        return None
    kind, rest = tree[0], tree[1:]
    match kind:
        case "and":
            return as_mask(rest[0], data) & as_mask(rest[1], data)
        case "or":
            return as_mask(rest[0], data) | as_mask(rest[1], data)
        case "causal":
            return masks.Causal()
        case "window":
            return masks.SlidingWindow(rest[0])
        case "blocks":
            return masks.BlockCausal(rest[0])
        case "prefix":
            return masks.PrefixLM(rest[0])
        case "prefixes":
            return masks.PrefixLM(data[f"prefixes{rest[0]}"])
        case "padding":
            return masks.Padding(data[f"valid{rest[0]}"])
        case "segments":
            return masks.Segments(
                data[f"query_ids{rest[0]}"], data[f"key_ids{rest[0]}"]
            )
        case "pairs":
            return masks.Explicit(data[f"pairs{rest[0]}"])
    raise ValueError(kind)


def as_pairs(tree, data, lengths):
    """The oracle's boolean array, or None."""
    if tree is None:
        return None
    kind, rest = tree[0], tree[1:]
    match kind:
        case "and":
            return as_pairs(rest[0], data, lengths) & as_pairs(
                rest[1], data, lengths
            )
        case "or":
            return as_pairs(rest[0], data, lengths) | as_pairs(
                rest[1], data, lengths
            )
        case "causal":
            return reference.causal(*lengths)
        case "window":
            return reference.window(*lengths, rest[0])
        case "blocks":
            return reference.blocks(*lengths, rest[0])
        case "prefix":
            return reference.prefix(*lengths, rest[0])
        case "prefixes":
            return reference.prefix(*lengths, data[f"prefixes{rest[0]}"])
        case "padding":
            return reference.padding(data[f"valid{rest[0]}"])
        case "segments":
            return reference.segments(
                data[f"query_ids{rest[0]}"], data[f"key_ids{rest[0]}"]
            )
        case "pairs":
            return np.swapaxes(data[f"pairs{rest[0]}"], 1, 2)
    raise ValueError(kind)


def kept(seed, shape, rate):
    """Which probabilities dropout keeps, by the hash that
    `keras_ring.random_bits` documents, in unsigned integers."""

    def mix(x):
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    first, second = np.array(seed, np.int32).view(np.uint32)[:, None]
    state = mix(first ^ mix(second ^ np.uint32(0x9E3779B9)))
    for axis, size in enumerate(shape):
        place = np.arange(size, dtype=np.uint32)
        place = place.reshape([-1 if a == axis else 1 for a in range(4)])
        state = mix(state + place * np.uint32(0x9E3779B1))
    signed = state.view(np.int32).astype(np.int64)
    return signed >= rate * 2**32 - 2**31


class Compiled:
    """A program on its devices, ready for many cases."""

    def __init__(self, program, names):
        self.program = program
        self.names = names
        strategy = keras_ring.DistributedStrategy(
            data_parallel=program.mesh[0],
            sequence_parallel=program.mesh[1],
            balance=program.balance,
            attention=program.attention,
        )
        self.call = strategy.world.program(self.attend)
        self.sees_shards = strategy.world.layers_see_shards

    def attend(self, *arrays):
        """What runs on the devices: results and gradients by name."""
        program = self.program
        data = dict(zip(self.names, arrays, strict=True))
        heads = range(program.heads[0])

        def cast(tensor):
            return ops.cast(tensor, program.dtype)

        mask = as_mask(program.mask, data)
        inputs = {n: cast(data[n]) for n in ("query", "key", "value")}
        if program.bias is not None:
            inputs["bias"] = cast(data["bias"])
        if program.alibi:
            slopes = [cast(data[f"slope{head}"]) for head in heads]
            inputs["alibi"] = ops.stack(slopes)
        if program.sinks:
            sinks = [cast(data[f"sink{head}"]) for head in heads]
            inputs["sinks"] = ops.stack(sinks)
        options = {}
        if program.dropout:
            seed = ops.stack([data["seed0"], data["seed1"]])
            options = {"dropout": program.dropout, "dropout_seed": seed}

        def function(*tensors):
            result = keras_ring.ops.ring_attention(
                **dict(zip(inputs, tensors, strict=True)),
                mask=mask,
                scale=program.scale,
                soft_cap=program.soft_cap,
                return_lse=program.return_lse,
                **options,
            )
            return list(result) if program.return_lse else [result]

        cotangents = [own_rows(cast(data["grad_out"]), program)]
        if program.return_lse:
            lse = "float64" if program.dtype == "float64" else "float32"
            grad_lse = own_rows(ops.cast(data["grad_lse"], lse), program)
            cotangents.append(grad_lse)
        outputs, gradients = vjp(function, list(inputs.values()), cotangents)
        wanted = [program.dtype, *(c.dtype for c in cotangents[1:])]
        for output, dtype in zip(outputs, wanted, strict=True):
            check_dtype("result", output, dtype)
        results = dict(zip(("out", "lse"), outputs, strict=False))
        for name, gradient in zip(inputs, gradients, strict=True):
            check_dtype(name, gradient, program.dtype)
            name = "slopes" if name == "alibi" else name
            if name in ("slopes", "sinks"):
                # Numbers are averaged over the devices, so that sums of
                # their terms come out.
                for head in heads:
                    results[f"grad_{name}{head}"] = gradient[head]
            else:
                results[f"grad_{name}"] = gradient
        wide = "float64" if program.dtype == "float64" else "float32"
        return {name: ops.cast(t, wide) for name, t in results.items()}

    def by_head(self, got):
        """The results, with the sums of what all members gave for a head."""
        terms = self.program.devices if self.sees_shards else 1
        for name in ("grad_slopes", "grad_sinks"):
            numbers = [n for n in got if n.startswith(name)]
            if numbers:
                got[name] = terms * np.stack([got.pop(n) for n in numbers])
        return got


def own_rows(cotangent, program):
    """Zero where a shard is padded: what is there is no result, and a
    gradient of it would be one of another function."""
    positions = keras_ring.ops.sequence_positions(cotangent)
    positions = ops.reshape(
        positions, (1, -1, *[1] * (len(cotangent.shape) - 2))
    )
    own = ops.cast(positions < program.lengths[0], cotangent.dtype)
    return cotangent * own


def check_dtype(name, tensor, dtype):
    dtype = keras.backend.standardize_dtype(dtype)
    found = keras.backend.standardize_dtype(tensor.dtype)
    assert found == dtype, f"{name} is {found}, not {dtype}"


@contextlib.contextmanager
def computed(program):
    """With tiles and portions of the program's size and the kernel that it
    names."""
    tile, kernel = tiles.TILE, config.kernel()
    portions, bands = placement.portions, placement.bands

    def smaller(cut):
        return lambda length, parts, most: cut(
            length, parts, most and (program.portion or most)
        )

    tiles.TILE = program.tile
    placement.portions, placement.bands = smaller(portions), smaller(bands)
    config.set_kernel(program.kernel)
    try:
        yield
    finally:
        tiles.TILE = tile
        placement.portions, placement.bands = portions, bands
        config.set_kernel(kernel)


@contextlib.contextmanager
def precision(dtype):
    """JAX computes in float64 only where it is told to."""
    if keras.backend.backend() == "jax" and dtype == "float64":
        import jax

        with jax.enable_x64(True):
            yield
    else:
        yield


def check_cases(seed, number, cases, attention=None):
    """Run the cases of one program; the first that is wrong is an error.

    Args:
        seed, number, attention: see `draw_program`.
        cases: numbers of cases.

    Returns:
        For each result the largest share of its bound that was used, over
        all cases.
    """
    program = draw_program(seed, number, attention)
    compiled = None
    used: dict[str, float] = {}
    for case in cases:
        data = draw_case(program, seed, number, case)
        try:
            with precision(program.dtype), computed(program):
                if compiled is None:
                    compiled = Compiled(program, list(data))
                got = compiled.call(list(data.values()))
                got = {k: ops.convert_to_numpy(v) for k, v in got.items()}
                got = compiled.by_head(got)
            if os.environ.get("RANK", "0") == "0":
                for name, share in compare(program, data, got).items():
                    used[name] = max(used.get(name, 0.0), share)
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__}: {error}\n\n{program}\n\n"
                f"This is case {case} of program {number} with seed {seed} "
                f"on {keras.backend.backend()}. To repeat it:\n  "
                f"KERAS_BACKEND={keras.backend.backend()} python -m "
                f"tests.fuzz --seed {seed} --program {number} --case {case}"
            ) from error
    return used


def compare(program, data, got):
    """Raise AssertionError where a result is wrong."""
    heads = range(program.heads[0])
    options: dict[str, Any] = {
        "scale": program.scale,
        "soft_cap": program.soft_cap,
        "bias": data.get("bias"),
        "slopes": [data[f"slope{h}"] for h in heads] if program.alibi else None,
        "sinks": [data[f"sink{h}"] for h in heads] if program.sinks else None,
    }
    grad_lse = data.get("grad_lse")
    shape = (program.batch, program.heads[0], *program.lengths)
    drops = None
    if program.dropout:
        drops = kept((data["seed0"], data["seed1"]), shape, program.dropout)
    tensors = [data[n] for n in ("query", "key", "value", "grad_out")]
    found = reference.full_attention(
        *tensors,
        allowed=as_pairs(program.mask, data, program.lengths),
        kept=drops,
        rate=program.dropout,
        grad_lse=grad_lse,
        **options,
    )
    allowed = rounding.bounds(found, *tensors, grad_lse, options, program.dtype)
    used = {}
    for name, have in got.items():
        want, bound = getattr(found, name), allowed[name]
        used[name] = compare_one(name, have, want, bound, program.dtype)
    # Where nothing is attended to, zero is exact.
    empty = ~np.isfinite(found.scores).any(-1)
    empty = np.swapaxes(empty, 1, 2)
    assert not got["out"][empty].any(), "out of rows that see nothing"
    assert not got["grad_query"][empty].any(), "grad_query of empty rows"
    return used


def compare_one(name, have, want, bound, dtype):
    """The largest error as a share of its bound; raises if over 1."""
    assert have.shape == want.shape, (name, have.shape, want.shape)
    bound = SAFETY * bound + SMALLEST[dtype]
    largest = LARGEST.get(dtype, np.inf)
    overflow = np.abs(want) + bound > largest
    overflow &= np.isfinite(want)
    endless = np.isinf(want)
    wrong = endless & (have != want)
    wrong |= ~endless & ~overflow & ~np.isfinite(have)
    assert not wrong.any(), (
        f"{name} is not finite where it should be, or finite where it should "
        f"not, at {np.argwhere(wrong)[:5].tolist()}: "
        f"{have[wrong][:5]}, not {want[wrong][:5]}"
    )
    counted = ~endless & ~overflow
    have, want = (np.where(counted, t, 0.0) for t in (have, want))
    share = np.abs(have - want) / bound
    if not share.size:
        return 0.0
    place = np.unravel_index(share.argmax(), share.shape)
    assert share[place] <= 1, (
        f"{name} is wrong at {[int(i) for i in place]}: {have[place]}, not "
        f"{want[place]} +- {bound[place]:.2e}, and at "
        f"{int((share > 1).sum())} of {share.size} places"
    )
    return float(share[place])
