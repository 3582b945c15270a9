"""Faults put into the package one by one, which the default tests must find.

    python -m tests.mutations [names ...] [--list]

Each is one piece of the package's text and what stands in its place. It is
put into a copy of the project in a temporary folder, where the tests that must
fail run on one backend as `make test` runs them: without `--all`, since the
faults are there to tell whether what is left out is shown by something else.
Prints for each whether it was caught; the exit code is 1 if one survived.

A fault is found by its text alone, which must be in one place of the package:
files may be moved.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("keras_ring", "tests", "pyproject.toml", "README.md")
# Seconds for the tests of one fault: some make processes wait for others.
LIMIT = 900


class Mutation(NamedTuple):
    """A fault, and what must find it.

    Attributes:
        name: of the fault.
        old: text that is in one place of the package.
        new: what takes its place.
        backend: that the tests run on.
        files: of the tests, without `tests/test_` and `.py`.
        tests: an expression for pytest's `-k`; all of the files if empty.
    """

    name: str
    old: str
    new: str
    backend: str
    files: str
    tests: str = ""


MUTATIONS = [
    # The loop around the ring.
    Mutation(
        "chunks come from the other side",
        "return (index - hop + size) % size",
        "return (index + hop) % size",
        *("jax", "attention", "equals_the_oracle"),
    ),
    Mutation(
        "the last visit is forgotten",
        "        meet(last, visiting, partials)\n",
        "        meet(last, visiting, list(partials))\n",
        *("jax", "attention", "equals_the_oracle"),
    ),
    Mutation(
        "gradients do not come home",
        "grads = self.transport.shift(grads, by=-last)",
        "grads = self.transport.shift(grads, by=last)",
        *("jax", "attention", "equals_the_oracle"),
    ),
    Mutation(
        "gradients that stayed at home are forgotten",
        "return self._plus(grads, home) if home else grads",
        "return grads",
        *("torch", "attention", "equals_the_oracle"),
    ),
    Mutation(
        "portions begin where chunks do",
        "return tuple(start + portion.begin for start in starts)",
        "return tuple(starts)",
        *("torch", "differential", "random_cases"),
    ),
    Mutation(
        "bands begin where their part does",
        "return (starts[self.part] + self.offset,)",
        "return (starts[self.part],)",
        *("torch", "differential", "random_cases"),
    ),
    Mutation(
        "a compiled loop begins with hop 0",
        'hops = jax.numpy.arange(first, first + count, dtype="int32")',
        'hops = jax.numpy.arange(0, count, dtype="int32")',
        *("jax", "differential", "random_cases"),
    ),
    Mutation(
        "a window's hops are counted backwards",
        "needed.add((query - key) % size)",
        "needed.add((key - query) % size)",
        *("jax", "communication", "hops"),
    ),
    # Partial results.
    Mutation(
        "the log-sum-exp of two parts is the larger one",
        "empty, first.lse + second.lse, reference + ops.log(safe_total)",
        "empty, first.lse + second.lse, reference",
        *("torch", "numerics", "merge"),
    ),
    Mutation(
        "rows without keys are not a number",
        "reference = ops.where(empty, ops.zeros_like(top), top)",
        "reference = top",
        *("torch", "numerics attention", "merge or hard_inputs"),
    ),
    Mutation(
        "the gradient of the log-sum-exp has another sign",
        "return ops.sum(grad_out * out, axis=-1) - grad_lse",
        "return ops.sum(grad_out * out, axis=-1) + grad_lse",
        *("tensorflow", "attention", "equals_the_oracle"),
    ),
    # Masks.
    Mutation(
        "a causal mask hides the own position",
        "return (query_positions[:, None] >= key_positions[None, :])",
        "return (query_positions[:, None] > key_positions[None, :])",
        *("jax", "numerics attention", "relation or causal"),
    ),
    Mutation(
        "chunks that are causal in a corner are left out",
        "return queries.last >= keys.first, queries.first >= keys.last\n",
        "return queries.last > keys.first, queries.first >= keys.last\n",
        *("torch", "numerics", "relation"),
    ),
    Mutation(
        "a window is one position wider",
        "return (ops.abs(distance) < _limit(self.size))[None, None]",
        "return (ops.abs(distance) <= _limit(self.size))[None, None]",
        *("jax", "numerics", "window"),
    ),
    Mutation(
        "a window makes a hop too few",
        "return self.size - 1, self.size - 1",
        "return self.size - 2, self.size - 2",
        *("torch", "communication", "hops"),
    ),
    Mutation(
        "documents see earlier ones",
        "ops.equal(self.query_ids[:, :, None], self.key_ids[:, None, :])",
        "(self.query_ids[:, :, None] >= self.key_ids[:, None, :])",
        *("torch", "differential", "packed"),
    ),
    Mutation(
        "what one document has of queries is seen whole",
        "ops.all(ops.logical_and(same, single), axis=2),",
        "ops.all(single, axis=2),",
        *("jax", "numerics", "tensors"),
    ),
    Mutation(
        "padding is attended to",
        'return ops.cast(self.valid, "bool")[:, None, None, :]',
        'return ops.cast(self.valid, "bool")[:, None, None, :] | True',
        *("torch", "attention", "equals_the_oracle"),
    ),
    Mutation(
        "a prefix ends a position early",
        "in_prefix = (key_positions < _limit(self.length))",
        "in_prefix = (key_positions < self.length - 1)",
        *("jax", "numerics", "prefix"),
    ),
    # Scores and their gradients.
    Mutation(
        "the derivative of a soft cap",
        "derivative = 1.0 - turn * turn",
        "derivative = 1.0 - turn",
        *("jax", "differential", "random_cases"),
    ),
    Mutation(
        "distances are a bonus",
        "extra = -slopes[:, :, None] * self.distances(i, j)",
        "extra = slopes[:, :, None] * self.distances(i, j)",
        *("jax", "differential", "random_cases"),
    ),
    Mutation(
        "the gradient of slopes has another sign",
        'extra["slopes"] = extra["slopes"] - own["slopes"]',
        'extra["slopes"] = extra["slopes"] + own["slopes"]',
        *("torch", "differential", "random_cases"),
    ),
    Mutation(
        "the bias of the first keys is that of all",
        "bias = columns(self._tile(i, j).bias, self.keys.positions(j))",
        "bias = columns(self._tile(i, j).bias, self.keys.positions(0))",
        *("tensorflow", "differential", "random_cases"),
    ),
    Mutation(
        "sinks have no share",
        "share = ops.sigmoid(above)[..., None]",
        "share = ops.sigmoid(ops.stop_gradient(above))[..., None]",
        *("torch", "differential", "random_cases"),
    ),
    # Dropout.
    Mutation(
        "another hash",
        "state = _mix(state + coordinate * _constant(0x9E3779B1))",
        "state = _mix(state + coordinate * _constant(0x9E3779B3))",
        *("jax", "dropout", "bits"),
    ),
    Mutation(
        "every device drops as for the first rows",
        'batch = dropout.first_row + ops.arange(self.batch, dtype="int32")',
        'batch = ops.arange(self.batch, dtype="int32")',
        *("torch", "dropout", "training_with_dropout"),
    ),
    Mutation(
        "what is kept is not scaled",
        "kept = _turned(kept) if turned else kept\n"
        "        share = 1.0 / (1.0 - dropout.rate)",
        "kept = _turned(kept) if turned else kept\n        share = 1.0",
        *("tensorflow", "differential", "dropout_is"),
    ),
    # Placement.
    Mutation(
        "balanced chunks are not those that arrive",
        "low, high = index, 2 * size - 1 - index",
        "low, high = index, 2 * size - 2 - index",
        *("jax", "communication", "halves or balance"),
    ),
    Mutation(
        "balanced chunks do not go back",
        "return _moved(transport, tensors, axes, [_inverse(m) for m in moves])",
        "return _moved(transport, tensors, axes, moves)",
        *("torch", "communication", "halves"),
    ),
    # The choice of a kernel.
    Mutation(
        "a kernel is taken unproven",
        "if kernel.preferred(device, dtype) and agrees(",
        "if kernel.preferred(device, dtype) or agrees(",
        *("torch", "kernels", ""),
    ),
    Mutation(
        "the C++ attention adds up without decay",
        "    store(decay + i, exp2(load(decay + i)));",
        "    store(decay + i, all(1.0f));",
        *("torch", "torch_native", "visits"),
    ),
    # Transports.
    Mutation(
        "JAX: transfers go the other way",
        "tuple(tensors), self.axis, list(enumerate(permutation))",
        "tuple(tensors), self.axis, "
        "[(b, a) for a, b in enumerate(permutation)]",
        *("jax", "transport", ""),
    ),
    Mutation(
        "TensorFlow: copies come from the other side",
        "source = first + inverse[replica - first]",
        "source = first + inverse.index(replica - first)",
        *("tensorflow", "transport", ""),
    ),
    Mutation(
        "TensorFlow: gradients go as values do",
        "list(itertools.compress(gradients, floating)),\n"
        "                        inverse,\n"
        "                        permutation,",
        "list(itertools.compress(gradients, floating)),\n"
        "                        permutation,\n"
        "                        inverse,",
        *("tensorflow", "tensorflow_replicas", "transposed"),
    ),
    Mutation(
        "PyTorch: messages go the other way",
        "permutation[self.index()],\n"
        "            permutation.index(self.index()),",
        "permutation.index(self.index()),\n"
        "            permutation[self.index()],",
        *("torch", "transport", ""),
    ),
    Mutation(
        "PyTorch: shared memory is written before it was read",
        "            if slot.free:\n",
        "            if True:\n",
        *("torch", "torch_shared_memory", ""),
    ),
    # Ways to share the sequence.
    Mutation(
        "every device drops as for the first heads",
        'heads = dropout.first_head + ops.arange(self.heads, dtype="int32")',
        'heads = ops.arange(self.heads, dtype="int32")',
        *("torch", "ways differential", "training or random_cases"),
    ),
    Mutation(
        "all-to-all: every device takes the slopes of the first heads",
        "slopes = ops.slice(slopes, (first,), (own,))",
        "slopes = ops.slice(slopes, (first * 0,), (own,))",
        *("jax", "ways differential", "training or random_cases"),
    ),
    Mutation(
        "all-to-all: gradients of repeated heads are not summed",
        "return ops.sum(ops.reshape(grad, shape), axis=2)",
        "return ops.reshape(grad, shape)[:, :, 0]",
        *("jax", "ways", "training"),
    ),
    Mutation(
        "all-gather: a device keeps the gradients of its own keys alone",
        "asked = ops.cast(asked, accumulation_dtype(dtype))",
        "asked = ops.cast(asked[:1], accumulation_dtype(dtype))",
        *("torch", "ways", "training"),
    ),
    Mutation(
        "groups of neighbours are those of the ring between them",
        "return index % inner if neighbours else index // inner",
        "return index // inner if neighbours else index % inner",
        *("tensorflow", "transport", "groups"),
    ),
    # Training.
    Mutation(
        "PyTorch: gradients are summed",
        "gradient = next(everyones) / count",
        "gradient = next(everyones)",
        *("torch", "training", "smaller_last_batch"),
    ),
    Mutation(
        "TensorFlow: gradients are summed",
        "operations.SUM if summed else operations.MEAN,",
        "operations.SUM,",
        *("tensorflow", "global_counts own_losses", "several or both-padded"),
    ),
    Mutation(
        "TensorFlow: replicas of a ring get their parts in another order",
        "world.layout.index(replica, axis) for axis in (BATCH, SEQUENCE)",
        "world.layout.index(replica, axis) for axis in (SEQUENCE, BATCH)",
        *("tensorflow", "global_counts own_losses", "several or both-padded"),
    ),
    Mutation(
        "PyTorch: a loss is a mean of the processes' means",
        "total = self.everyones_sum(counted)",
        "total = counted * self.devices",
        *("torch", "global_counts", "losses_and_metrics"),
    ),
    Mutation(
        "TensorFlow: a loss is a mean of the replicas' means",
        "total = self.everyones_sum(counted)",
        "total = counted * self.devices",
        *("tensorflow", "global_counts own_losses", "several or both-padded"),
    ),
    Mutation(
        "padded parts weigh as much as others",
        "return self.share(output) * self.devices",
        "return 1.0",
        *("torch", "global_counts", "losses_and_metrics"),
    ),
    Mutation(
        "a pooled output is summed by every member",
        "weight = self.devices / copies * self.present(output)",
        "weight = self.devices * self.present(output)",
        *("torch", "global_counts", "losses_and_metrics"),
    ),
    Mutation(
        "padding is at the start",
        "return clip(true - index * local, 0, local)",
        "return clip(true - (self.parts - 1 - index) * local, 0, local)",
        *("torch", "lengths", ""),
    ),
    Mutation(
        "PyTorch: metrics forget earlier steps",
        "variable.assign(counts if before is None else before + counts)",
        "variable.assign(counts)",
        *("torch", "training", "smaller_last_batch"),
    ),
    Mutation(
        "a loss of the whole is taken for one of positions",
        "if not position_wise.loss(self, y_pred, output.split):",
        "if False:",
        *("tensorflow", "own_losses", ""),
    ),
    Mutation(
        "PyTorch: every process draws the same",
        "offset = (rank * random_bits.STRIDE) & 0xFFFFFFFF",
        "offset = 0 & 0xFFFFFFFF",
        *("torch", "dropout", "hidden"),
    ),
    Mutation(
        "TensorFlow: every replica draws the same",
        "offset = (replica * random_bits.STRIDE) % 2**31",
        "offset = 0",
        *("tensorflow", "dropout", "hidden"),
    ),
    Mutation(
        "PyTorch: predictions of rings change places",
        "parts.reshape(self.data_size, self.sequence_size, size, *rest)",
        "parts.reshape(self.sequence_size, self.data_size, size, *rest)"
        ".transpose(0, 1)",
        *("torch", "training", "smaller_last_batch"),
    ),
    # Layers and losses.
    Mutation(
        "positions count from 0 in every shard",
        'return positions + ops.cast(start, "int32")',
        "return positions",
        *("torch", "positions", ""),
    ),
    Mutation(
        "vectors of positions are those of the first shard",
        "return ops.slice(table, [first + start_index, 0], [length, width])",
        "return ops.slice(table, [start_index, 0], [length, width])",
        *("torch", "positions", ""),
    ),
    Mutation(
        "halves of rotated features turn the same way",
        "ops.cast(first * cos - second * sin, inputs.dtype)",
        "ops.cast(first * cos + second * sin, inputs.dtype)",
        *("jax", "positions", ""),
    ),
    Mutation(
        "the square of a log-sum-exp is forgotten",
        "loss = loss + z_loss * lse * lse",
        "loss = loss + z_loss * lse",
        *("jax", "cross_entropy", "float64"),
    ),
    Mutation(
        "gradients of weights are those of the last chunk",
        "total + ops.cast(grad, total.dtype)\n",
        "ops.cast(grad, total.dtype)\n",
        *("jax", "feed_forward", "dense_layers"),
    ),
    Mutation(
        "a saved layer forgets its sinks",
        '"alibi": slopes,\n            **made,',
        '"alibi": slopes,\n            **(made | {"sinks": False}),',
        *("torch", "saving ring_attention_layer", "checkpoint or config"),
    ),
    Mutation(
        "checkpoints name a backend's own optimizers",
        "if isinstance(module, str) and module.startswith(_OF_A_BACKEND):",
        "if False:",
        *("jax", "saving", ""),
    ),
    Mutation(
        "quantized projections run as if they were not",
        "layer is not None and layer.quantization_mode is not None",
        "False and layer.quantization_mode is not None",
        *("torch", "quantize", ""),
    ),
    # The guard.
    Mutation(
        "a layer over the sequence is let through",
        '    Rule(("GroupNormalization",), "its statistics are those of the '
        'shard"),\n',
        "",
        *("torch", "guard", ""),
    ),
    Mutation(
        "windows along the sequence are let through",
        "        or _first(window) != 1\n",
        "",
        *("tensorflow", "guard", ""),
    ),
    # Sharded weights, heads on several devices.
    Mutation(
        "a part is cut from the wrong place",
        "self.start = min(world.rank * self.size, self.numel)",
        "self.start = min((world.rank ^ 1) * self.size, self.numel)",
        *("torch", "sharded_weights", "training_is_that"),
    ),
    Mutation(
        "PyTorch: norms are those of parts",
        "return torch.sqrt(world.everyone.sum(torch.stack(squares)))",
        "return torch.sqrt(torch.stack(squares))",
        *("torch", "sharded_weights", "training_is_that"),
    ),
    Mutation(
        "PyTorch: updated parts of weights are not sent",
        "    weights.gather_updated(variables)\n",
        "",
        *("torch", "sharded_weights", "training_is_that"),
    ),
    Mutation(
        "PyTorch: gathered weights are kept for the backward",
        "return _View(source, tensor.size(), tensor.stride(), offset)",
        "return tensor",
        *("torch", "sharded_weights", "gathered_weights_go"),
    ),
    Mutation(
        "PyTorch: an overflow is one on its part alone",
        "gradients = weights.alike(world, gradients)",
        "pass",
        *("torch", "sharded_weights", "what_users_do"),
    ),
    Mutation(
        "JAX: the optimizer keeps everything",
        "layout = active.distribution.in_parts(layout, shape)",
        "pass",
        *("jax", "sharded_weights", "training_is_that"),
    ),
    Mutation(
        "dropout by head forgets which heads a device has",
        "world.head_index() * query.shape[2],",
        "0,",
        *("jax", "jax_model_axis", "ring"),
    ),
    Mutation(
        "key heads are not copied for the devices that share heads",
        "if query.shape[2] % devices or heads % devices == 0:",
        "if True:",
        *("jax", "jax_model_axis", "no_activation"),
    ),
]


def place(old: str) -> Path:
    """The file of the package that has a text, from the project's folder.

    Raises:
        ValueError: unless it is in one place.
    """
    found = [
        path
        for path in sorted((ROOT / "keras_ring").rglob("*"))
        if path.suffix in (".py", ".cpp", ".h")
        for _ in range(path.read_text(encoding="utf-8").count(old))
    ]
    if len(found) != 1:
        raise ValueError(
            "The text of a fault must be in one place of the package. "
            f"Received: {old!r}, in {[str(path) for path in found]}."
        )
    return found[0].relative_to(ROOT)


def verdict(mutation: Mutation) -> str:
    """Run the tests on a copy that has the fault: what came of them."""
    path = place(mutation.old)
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        faulty = Path(folder) / path
        text = faulty.read_text(encoding="utf-8")
        faulty.write_text(
            text.replace(mutation.old, mutation.new), encoding="utf-8"
        )
        try:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", "-x", "-q"),
                    *("-p", "no:cacheprovider"),
                    *(f"tests/test_{n}.py" for n in mutation.files.split()),
                    *(("-k", mutation.tests) if mutation.tests else ()),
                ],
                cwd=folder,
                env=os.environ
                | {"KERAS_BACKEND": mutation.backend, "PYTHONPATH": folder},
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "caught: the tests do not end"
    if done.returncode == 0:
        return "SURVIVED"
    failed = [
        line.split(" - ")[0].removeprefix("FAILED tests/")
        for line in done.stdout.splitlines()
        if line.startswith("FAILED")
    ]
    if done.returncode == 1 and failed:
        return f"caught by {failed[0]}"
    # A fault that cannot even be imported says nothing about tests.
    end = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
    return f"NO TEST RAN TO ITS END (pytest: {done.returncode})\n{end}"


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations")
    parser.add_argument("names", nargs="*", help="parts of faults' names")
    parser.add_argument(
        "--list", action="store_true", help="show where each is, and run none"
    )
    options = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.names or any(n in mutation.name for n in options.names)
    ]
    left = []
    for mutation in chosen:
        if options.list:
            print(f"{mutation.name}: {place(mutation.old)}")
            continue
        begin = time.monotonic()
        found = verdict(mutation)
        seconds = time.monotonic() - begin
        print(f"{mutation.name}: {found} ({seconds:.0f} s)", flush=True)
        if not found.startswith("caught"):
            left.append(mutation.name)
    if not options.list:
        print(f"{len(chosen) - len(left)} of {len(chosen)} were caught.")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
