"""Simulated devices for the backend that Keras runs on.

`KERAS_BACKEND=jax python -m pytest tests` runs the shared tests and those of
that backend on real collectives: 8 simulated CPU devices on JAX, 4 logical
CPU devices on TensorFlow, real gloo processes on PyTorch.
"""

import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    # `JAX_PLATFORMS=cuda` is for tests/test_jax_gpu.py.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests import xla_flags

    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), *xla_flags.flags()]
    )
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest  # noqa: E402

from tests import thinning, worlds  # noqa: E402

collect_ignore_glob = [
    f"test_{other}_*.py" for other in thinning.BACKENDS if other != BACKEND
]
# The file that needs a GPU, unless there is one.
NEEDS_GPU = {"jax": "test_jax_gpu.py", "torch": "test_torch_cuda.py"}
collect_ignore = []
if BACKEND in NEEDS_GPU and not worlds.has_gpu():
    collect_ignore.append(NEEDS_GPU[BACKEND])
# What is not run, by reason, for the summary.
LEFT_OUT = pytest.StashKey[dict]()
MARKS = {
    "once": "no backend has a part in it: one of them runs it",
    "pairwise": "runs every pair of its parameters' values; all with --all",
    "mostly(every, name=value)": (
        "runs all with one value, few with the others; all with --all"
    ),
    "extra": "runs with --all",
    "dealt(tests=False, by=None)": (
        "its combinations, the values of a parameter, or the tests of a class, "
        "are dealt out among the backends; all with --all"
    ),
}


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="every combination of parameters (tests/thinning.py)",
    )
    parser.addoption(
        "--part",
        default="1/1",
        help="one of some parts of the files: 1/4 to 4/4",
    )
    parser.addoption(
        "--without-once",
        action="store_true",
        help="without the tests that no backend has a part in",
    )


def pytest_configure(config):
    for name, text in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    config.stash[LEFT_OUT] = {}
    if _only_hands_out_tests(config):
        return
    worlds.simulate_devices()
    # What has been imported stays, and tracing makes millions of objects that
    # are gone through in each search for garbage.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_ignore_collect(collection_path, config):
    """Leave out files of other parts; of a single one all are there."""
    part, parts = map(int, config.option.part.split("/"))
    files = sorted(
        path.name
        for path in pathlib.Path(__file__).parent.glob("test_*.py")
        if not any(map(path.match, collect_ignore_glob))
    )
    own = files[part - 1 :: parts]
    if collection_path.name in files and collection_path.name not in own:
        return True
    return None


def _only_hands_out_tests(config):
    """True in the process of pytest-xdist that runs no test itself: it needs
    no framework, which takes seconds to import."""
    return bool(
        getattr(config.option, "dist", "no") != "no"
        and not hasattr(config, "workerinput")
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what another backend or `--all` runs."""
    left = {}
    if config.option.without_once:
        left["are run on another backend"] = {
            i for i, item in enumerate(items) if item.get_closest_marker("once")
        }
    named = any("::" in argument for argument in config.args)
    if not config.option.all and not named:
        left["are run with --all"] = thinning.left_out(
            [described(item) for item in items],
            BACKEND,
        )
    for item in items:
        # Their processes live as long as the worker that started them, and
        # keep both cores of a small machine busy.
        if "on_devices" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("processes"))
    gone = set().union(*left.values())
    config.hook.pytest_deselected(items=[items[i] for i in sorted(gone)])
    items[:] = [item for i, item in enumerate(items) if i not in gone]
    counts = {why: len(places) for why, places in left.items()}
    config.stash[LEFT_OUT].update(counts)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = counts


def described(item):
    """A test as `thinning.left_out` takes it."""
    marks = {
        mark.name: mark.kwargs
        for mark in item.iter_markers()
        if mark.name in ("pairwise", "mostly", "extra", "dealt")
    }
    values = item.callspec.params if hasattr(item, "callspec") else {}
    test = (item.parent.nodeid, getattr(item, "originalname", item.name))
    return test, marks, values


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker of pytest-xdist says what it has left out, as all have."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[LEFT_OUT].update(output.get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
    for why, count in config.stash[LEFT_OUT].items():
        if count:
            terminalreporter.write_line(f"{count} tests {why}.")
    for name in collect_ignore:
        terminalreporter.write_line(f"{name} needs a GPU: not collected.")


# Where TensorFlow rewrites programs as it does those of users.
REWRITTEN = ("test_tensorflow_", "test_training", "test_ring_attention_layer")


@pytest.fixture(autouse=True, scope="module")
def rewritten(request):
    own = request.module.__name__.rpartition(".")[2].startswith(REWRITTEN)
    worlds.rewrite_programs(own or request.config.option.all)


@pytest.fixture(scope="session")
def on_devices():
    """`on_devices(count, function, *arguments)`: run a function where
    `count` devices are, on every process that drives them, and return its
    result (that of the first process)."""
    pool = worlds.Worlds()
    yield pool.call
    pool.close()


@pytest.fixture
def automatic():
    """The kernel is chosen as by default, and nothing is proven yet."""
    from keras_ring import config
    from keras_ring.attention import selection

    selection.agrees.cache_clear()
    config.set_kernel("auto")
    yield
    config.set_kernel("auto")
    selection.agrees.cache_clear()


@pytest.fixture
def without_native(monkeypatch):
    """There is no C++ library."""
    from keras_ring.attention.native.kernel import NativeKernel

    monkeypatch.setattr(NativeKernel, "loads", lambda self: False)
