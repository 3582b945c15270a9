"""What a user installs, imports and reads."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import keras
import pytest

import keras_ring
from keras_ring import keras_internals
from tests import __main__ as runner

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_ring"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in the wheel that is built from a copy of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "out")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", f"--wheel-dir={folder}", str(source)),
        ],
        check=True,
        timeout=120,
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {
            name: archive.read(name).decode()
            for name in archive.namelist()
            if not name.endswith("/")
        }


@pytest.mark.once
def test_the_wheel_holds_what_the_tree_holds(wheel):
    in_tree = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {name for name in wheel if ".dist-info/" not in name}
    assert in_wheel == in_tree
    assert "keras_ring/py.typed" in in_wheel


@pytest.mark.once
def test_the_wheel_installs_one_top_level_package(wheel):
    version = keras_ring.__version__
    assert {name.split("/")[0] for name in wheel} == {
        "keras_ring",
        f"keras_ring-{version}.dist-info",
    }


@pytest.mark.once
def test_the_wheel_needs_keras_and_no_backend(wheel):
    (metadata,) = (t for n, t in wheel.items() if n.endswith("/METADATA"))
    lines = metadata.splitlines()
    needs = [x.split(": ", 1)[1] for x in lines if x.startswith("Requires-D")]
    always = [need for need in needs if "extra ==" not in need]
    assert always == ["keras>=3.15", "numpy"]
    extras = {x.split(": ", 1)[1] for x in lines if x.startswith("Provides-E")}
    assert extras == {
        *("jax", "tensorflow", "torch"),
        *("examples", "docs", "dev"),
    }
    assert "License-Expression: Apache-2.0" in lines
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


@pytest.mark.once
def test_the_root_shows_the_backends():
    link = ROOT / "backends"
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / "backends"


@pytest.mark.once
def test_the_keras_that_was_tested_is_named(monkeypatch):
    newest = keras_internals.NEWEST_TESTED
    assert newest in (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.delattr("keras.src.backend.common.masking.get_keras_mask")
    with pytest.raises(NotImplementedError) as caught:
        keras_internals.mask_of(keras.ops.ones(1))
    for part in ("get_keras_mask", f"keras {keras.__version__}", newest):
        assert part in str(caught.value)


@pytest.mark.once
def test_tests_on_another_keras_are_on_that_one(tmp_path):
    with pytest.raises(ValueError, match="no Keras to test with"):
        runner.release(tmp_path)
    (tmp_path / "keras_x-9.9.dist-info").mkdir()
    metadata = tmp_path / "keras_x-9.9.dist-info" / "METADATA"
    metadata.write_text("Name: keras-x\nVersion: 9.9\n")
    # It is named there, and another one would be imported.
    with pytest.raises(ValueError, match="no Keras to test with"):
        runner.release(tmp_path)
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "__init__.py").touch()
    assert runner.release(tmp_path) == "keras-x 9.9"


def run_python(code: str) -> str:
    """What a fresh interpreter prints, on the backend of these tests."""
    # There may be another Keras, see `python -m tests --keras`.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_framework_that_keras_does_not():
    loaded = run_python(
        """
        import sys
        import keras
        names = {"jax", "tensorflow", "torch"}
        before = names & set(sys.modules)
        import keras_ring
        print(sorted(names & set(sys.modules) - before))
        """
    )
    assert loaded.strip() == "[]"


def test_a_backend_that_is_not_installed_is_named():
    found = run_python(
        """
        import os, sys
        backend = os.environ["KERAS_BACKEND"]
        sys.modules[backend] = None  # Importing it fails as if it were gone.
        try:
            import keras_ring
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    backend = keras.backend.backend()
    assert f"Received: backend={backend!r}, which is not." in found
    assert f"pip install '.[{backend}]'" in found


@pytest.mark.once
def test_the_script_of_the_readme_runs_as_it_stands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "KERAS_BACKEND" in block
    )
    shown = run_python(script)
    losses = [float(loss) for loss in re.findall(r"loss: ([0-9.]+)", shown)]
    assert losses[-1] < 0.8 * losses[0]
    assert "sequence parallel  8" in shown


DEVICES_STILL_OPEN = {
    # Each of these is refused, or without effect, once there are devices.
    "jax": """
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
        import jax
        assert jax.device_count() == 3, jax.devices()
        """,
    "tensorflow": """
        import tensorflow as tf
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 3,
        )
        assert len(tf.config.list_logical_devices("CPU")) == 3
        """,
    "torch": """
        import torch
        assert not torch.distributed.is_initialized()
        assert not torch.cuda.is_initialized()
        """,
}


def test_importing_initialises_no_device():
    run_python(
        "import keras_ring\n"
        + textwrap.dedent(DEVICES_STILL_OPEN[keras.backend.backend()])
    )


def public_modules():
    """The facade and the parts of it that are modules."""
    yield keras_ring
    for name in keras_ring.__all__:
        if inspect.ismodule(getattr(keras_ring, name)):
            yield getattr(keras_ring, name)


def public_objects():
    """Every public class and function, under its public name."""
    for module in public_modules():
        names = getattr(module, "__all__", None)
        if names is None:
            names = [
                name
                for name, value in vars(module).items()
                if not name.startswith("_")
                and getattr(value, "__module__", "") == module.__name__
            ]
        for name in names:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(public_objects())


@pytest.mark.once
def test_every_layer_is_exported():
    """What Keras can load by name has a public name here too."""
    found = []
    for path in (PACKAGE / "layers").glob("[a-z]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(
                "register_keras_serializable" in ast.unparse(decorator)
                for decorator in node.decorator_list
            ):
                found.append(node.name)
    assert sorted(found) == sorted(keras_ring.layers.__all__)


@pytest.mark.once
@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented(name):
    """Args where something is taken, Returns where something comes back,
    Raises where a refusal stands in the code."""
    thing = PUBLIC[name]
    text = inspect.getdoc(thing) or ""
    assert text, name
    assert not text.startswith(f"{thing.__name__}("), "a generated docstring"
    named_tuple = inspect.isclass(thing) and issubclass(thing, tuple)
    if named_tuple:
        assert "Attributes:" in text, name
        return
    source = textwrap.dedent(inspect.getsource(thing))
    tree = ast.parse(source).body[0]
    makers = {"__init__", "__post_init__"}
    bodies = [
        node
        for node in [tree, *ast.iter_child_nodes(tree)]
        if isinstance(node, ast.FunctionDef)
        and (node is tree or node.name in makers)
    ]
    takes = [
        parameter
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    if takes and not inspect.isabstract(thing):
        assert "Args:" in text, name
    raises = any(
        isinstance(node, ast.Raise)
        for body in bodies
        for node in ast.walk(body)
    )
    if raises:
        assert "Raises:" in text, name
    if inspect.isfunction(thing):
        assert "Returns:" in text, name
