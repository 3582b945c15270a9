"""One attention problem, and everybody who solves it.

`attention(name, ...)` makes a function that computes causal self-attention
forward and backward, compiled where the framework compiles, with its data
on the device(s) already, and that returns when the work is done. On PyTorch
it runs in each of the processes.

Nothing here is imported before it is used, so that a peer's environment
needs no Keras.
"""

import functools
import math
import os

import numpy as np

HEADS, HEAD_DIM = 8, 64

# Who solves it on one device without help, by backend.
STOCK = {
    "jax": ("jax.nn.dot_product_attention", "keras.ops.dot_product_attention"),
    "tensorflow": ("keras.ops.dot_product_attention",),
    "torch": (
        "F.scaled_dot_product_attention",
        "keras.ops.dot_product_attention",
    ),
}
LAYERS = ("RingAttention", "MultiHeadAttention")


def attention(
    name,
    length,
    heads=HEADS,
    head_dim=HEAD_DIM,
    batch=1,
    size=1,
    dtype="float32",
    chunk=512,
    way=None,
):
    """A step of the named contestant.

    Args:
        name: `ring_attention`, one of `STOCK` or `LAYERS`, or a peer's:
            `ringattention`, `ring-attention-pytorch`, and the latter
            `(striped)`.
        length: of the whole sequence.
        heads: of queries, keys and values.
        head_dim: of a head.
        batch: sequences.
        size: devices of the ring.
        dtype: of query, key and value.
        chunk: of a peer's own blocks.
        way: to share the attention of `ring_attention`; the strategy's if
            None.
    """
    shape = (batch, length, heads, head_dim)
    if name in LAYERS:
        return _layer_step(name, shape, dtype)
    if name == "ringattention":
        return _ringattention(shape, size, dtype, chunk)
    if name.startswith("ring-attention-pytorch"):
        return _ring_attention_pytorch(
            shape, size, dtype, chunk, "striped" in name
        )
    backend = os.environ["KERAS_BACKEND"]
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[backend](
        name, shape, size, dtype, functools.partial(_causal, way)
    )


def draw(shape, count=4):
    """Query, key, value and the gradient of the result."""
    generator = np.random.default_rng(0)
    return [
        generator.standard_normal(shape, dtype=np.float32) for _ in range(count)
    ]


def _causal(way, query, key, value):
    import keras_ring

    options = {} if way is None else {"attention": way}
    return keras_ring.ops.ring_attention(
        query, key, value, mask=keras_ring.masks.Causal(), **options
    )


def _keras_attention(query, key, value):
    from keras import ops

    places = ops.arange(query.shape[1])
    mask = (places[:, None] >= places[None])[None, None]
    return ops.dot_product_attention(query, key, value, mask=mask)


def _jax(name, shape, size, dtype, ours):
    import jax

    tensors = draw(shape)
    if name == "ring_attention":
        import keras_ring

        if size > 1:
            strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
            split = jax.sharding.NamedSharding(
                strategy.world.mesh, jax.sharding.PartitionSpec(None, "seq")
            )
            with strategy.scope():
                return _jax_step(ours, tensors, dtype, split)
        attend = ours
    elif name == "jax.nn.dot_product_attention":
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    else:
        attend = _keras_attention
    return _jax_step(attend, tensors, dtype)


def _jax_step(attend, tensors, dtype, sharding=None):
    """`attend` and its gradients, compiled, over placed tensors."""
    import jax

    placed = [
        jax.device_put(t.astype(jax.numpy.dtype(dtype)), sharding)
        for t in tensors
    ]

    @jax.jit
    def both(query, key, value, grad_out):
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, pull_back(grad_out)

    compiled = both.lower(*placed).compile()
    return lambda: jax.block_until_ready(compiled(*placed))


def _tensorflow(name, shape, size, dtype, ours):
    import tensorflow as tf

    tensors = [tf.cast(t, dtype) for t in draw(shape)]
    attend = ours if name == "ring_attention" else _keras_attention

    def both(*tensors):
        *inputs, grad_out = tensors
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = attend(*inputs)
        return out, tape.gradient(out, inputs, grad_out)

    if size == 1:
        program = tf.function(both, autograph=False, jit_compile=False)
        return lambda: ready(program(*tensors))
    import keras_ring

    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    replicas = strategy.world.tf_strategy

    def shard(tensor):
        chunk = tensor.shape[1] // size

        def part(context):
            place = context.replica_id_in_sync_group * chunk
            with tf.device(strategy.world.devices[place // chunk].upper()):
                return tf.identity(tensor[:, place : place + chunk])

        return replicas.experimental_distribute_values_from_function(part)

    with strategy.scope():
        shards = [shard(tensor) for tensor in tensors]
        program = tf.function(
            lambda *parts: replicas.run(both, parts),
            autograph=False,
            jit_compile=False,
        )

    def step():
        with strategy.scope():
            out, _ = program(*shards)
            ready(replicas.experimental_local_results(out))

    return step


def ready(result):
    """Wait for what a program of TensorFlow computes."""
    import tensorflow as tf

    for tensor in tf.nest.flatten(result):
        # One element is enough: an accelerator computes in order.
        tensor[(0,) * tensor.shape.rank].numpy()


def _torch(name, shape, size, dtype, ours):
    import torch

    if name == "F.scaled_dot_product_attention":
        # Heads first, as it wants them: no transposition is timed.
        batch, length, heads, head_dim = shape
        tensors = _torch_tensors((batch, heads, length, head_dim), dtype)
        return _torch_step(
            functools.partial(
                torch.nn.functional.scaled_dot_product_attention, is_causal=True
            ),
            tensors,
        )
    if name != "ring_attention" or size == 1:
        attend = ours if name == "ring_attention" else _keras_attention
        return _torch_step(attend, _torch_tensors(shape, dtype))
    import keras_ring

    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    world = strategy.world
    step = _torch_step(
        ours, _own_chunk(_torch_tensors(shape, dtype), size, world.rank)
    )

    def inside():
        with strategy.scope(), world.stepping():
            step()

    return inside


def _torch_tensors(shape, dtype):
    import torch

    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = "cuda"
    return [
        torch.from_numpy(t).to(device, getattr(torch, dtype))
        for t in draw(shape)
    ]


def _own_chunk(tensors, size, rank):
    return [t.chunk(size, 1)[rank].contiguous() for t in tensors]


def _torch_step(attend, tensors):
    import torch

    *inputs, grad_out = tensors
    for tensor in inputs:
        tensor.requires_grad_()

    def step():
        out = attend(*inputs)
        gradients = torch.autograd.grad(out, inputs, grad_out)
        if out.is_cuda:
            torch.cuda.synchronize()
        return out, gradients

    return step


def _layer_step(name, shape, dtype):
    """A whole attention layer with its projections, on one device; the
    gradients are those of the inputs and the weights."""
    import keras

    import keras_ring

    batch, length, heads, head_dim = shape
    features = heads * head_dim
    if dtype != "float32":
        keras.config.set_dtype_policy(f"mixed_{dtype}")
    if name == "RingAttention":
        layer = keras_ring.layers.RingAttention(heads, head_dim, causal=True)
        arguments = {}
    else:
        layer = keras.layers.MultiHeadAttention(heads, head_dim)
        arguments = {"use_causal_mask": True}
    inputs = keras.Input((None, features))
    model = keras.Model(inputs, layer(inputs, inputs, **arguments))
    weights = model.trainable_variables
    x, grad_out = draw((batch, length, features), 2)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        @jax.jit
        def both(values, x, grad_out):
            def apply(values, x):
                return model.stateless_call(values, [], x, training=True)[0]

            out, pull_back = jax.vjp(apply, values, x)
            return out, pull_back(grad_out.astype(out.dtype))

        values = [variable.value for variable in weights]
        placed = jax.device_put((values, x, grad_out))
        return lambda: jax.block_until_ready(both(*placed))
    if backend == "tensorflow":
        import tensorflow as tf

        x, grad_out = tf.constant(x), tf.constant(grad_out)

        @tf.function(autograph=False, jit_compile=False)
        def program(x, grad_out):
            values = [variable.value for variable in weights]
            with tf.GradientTape() as tape:
                tape.watch(x)
                out = model(x, training=True)
            cotangent = tf.cast(grad_out, out.dtype)
            return out, tape.gradient(out, [x, *values], cotangent)

        return lambda: ready(program(x, grad_out))
    x, grad_out = (keras.ops.convert_to_tensor(t) for t in (x, grad_out))
    import torch

    def step():
        own = x.detach().requires_grad_()
        out = model(own, training=True)
        torch.autograd.grad(
            out, [own, *(v.value for v in weights)], grad_out.to(out.dtype)
        )
        if out.is_cuda:
            torch.cuda.synchronize()

    return step


def _ringattention(shape, size, dtype, chunk):
    """The package `ringattention` of the paper's authors (JAX)."""
    import jax
    import jax.extend.backend

    # It asks for the platform under a name that JAX no longer has.
    jax.lib.xla_bridge = jax.extend.backend
    from ringattention import ringattention

    chunk = min(chunk, shape[1] // size)
    attend = functools.partial(
        ringattention,
        axis_name="seq",
        float32_logits=True,
        blockwise_kwargs={
            "causal_block_size": 1,
            "deterministic": True,
            "dropout_rng": None,
            "attn_pdrop": 0.0,
            "query_chunk_size": chunk,
            "key_chunk_size": chunk,
            "dtype": jax.numpy.dtype(dtype),
            "policy": jax.checkpoint_policies.nothing_saveable,
            "precision": None,
            "prevent_cse": False,
        },
    )
    mesh = jax.make_mesh(
        (size,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec(None, "seq")
    mapped = jax.shard_map(
        lambda query, key, value: attend(query, key, value, None, None, None),
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    split = jax.sharding.NamedSharding(mesh, spec)
    return _jax_step(mapped, draw(shape), dtype, split)


def _ring_attention_pytorch(shape, size, dtype, chunk, striped):
    """The package `ring-attention-pytorch`."""
    import torch
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn
    from torch import distributed

    tensors = _torch_tensors(shape, dtype)
    distributed.init_process_group("nccl" if tensors[0].is_cuda else "gloo")
    torch.manual_seed(0)
    attend = functools.partial(
        ring_flash_attn,
        causal=True,
        bucket_size=math.gcd(chunk, shape[1] // size),
        ring_reduce_col=True,
        striped_ring_attn=striped,
        ring_size=size,
    )
    own = _own_chunk(tensors, size, distributed.get_rank())
    return _torch_step(attend, own)
