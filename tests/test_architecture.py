"""The package's own rules, read off its source.

Which module may import which, where a framework may be named, where private
names of Keras and the frameworks may stand, and that the backends are three
versions of one thing.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_ring"
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = ("jax", "tensorflow", "torch")

# What each part of the package may import of the others. Parts are the
# modules and folders directly under keras_ring/; "a backend" is a folder
# under backends/, which the loader in backends/__init__.py finds by name, so
# that nothing but the loader stands between it and the code above. A new
# part needs a line.
LEAVES = {
    *("arguments", "backends", "errors", "keras_internals", "lengths"),
    "mesh",
    *("numerics", "padding", "placement", "primitives", "random_bits"),
    *("schedule", "scopes", "scratch", "shapes", "transport", "version"),
}
MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "tensor_arguments": {"arguments"},
    "masks": {"arguments", "tensor_arguments"},
    "scoring": {"masks"},
    "visit": {"masks", "scoring"},
    "tiling": {
        *("masks", "numerics", "primitives", "random_bits", "schedule"),
        *("scoring", "visit"),
    },
    "kernel": {"numerics", "scoring", "shapes", "visit"},
    "native": {"kernel", "masks", "numerics", "scratch", "visit"},
    "blockwise": {"kernel", "numerics", "primitives", "tiling", "visit"},
    "sharing": {
        *("backends", "kernel", "masks", "numerics", "placement"),
        *("scoring", "shapes", "transport", "visit"),
    },
    "config": {"backends"},
    "kernels": {
        *("backends", "config", "kernel", "masks", "numerics", "scoring"),
        "visit",
    },
    "world": {"lengths", "mesh", "transport"},
    "strategy": {
        *("arguments", "backends", "errors", "kernels", "mesh"),
        *("placement", "tensor_arguments", "world"),
    },
    "batches": {"lengths", "padding", "world"},
    "step": {"batches", "keras_internals", "padding", "world"},
    "position_wise": set(),
    "whole_batch": {
        *("keras_internals", "ops", "position_wise", "step", "strategy"),
    },
    "counting": {
        *("keras_internals", "position_wise", "step", "whole_batch", "world"),
    },
    "chunked": {"backends", "numerics", "padding", "shapes", "strategy"},
    "shards": {"backends", "numerics", "padding", "transport"},
    "rematerialised": {"backends"},
    "ops": {
        *("arguments", "backends", "chunked", "kernel", "sharing"),
        *("kernels", "masks", "numerics", "padding", "placement"),
        *("random_bits", "scoring", "shapes", "shards", "strategy"),
        *("tensor_arguments", "transport", "trials", "world"),
    },
    "layers": {
        *("arguments", "backends", "keras_internals", "masks", "numerics"),
        *("ops", "padding", "placement", "random_bits", "rematerialised"),
        *("scoring", "strategy", "tensor_arguments", "trials", "world"),
    },
    "losses": {
        *("arguments", "keras_internals", "layers", "masks", "numerics"),
        *("ops", "placement", "strategy", "tensor_arguments", "world"),
    },
    "trials": {"transport"},
    "indexing": {"keras_internals", "lengths", "ops", "strategy"},
    "guard": {
        *("batches", "indexing", "keras_internals", "layers", "lengths"),
        *("ops", "strategy", "trials", "world"),
    },
    "checkpoints": {"keras_internals", "strategy"},
    "training": {
        *(
            "backends",
            "checkpoints",
            "batches",
            "counting",
            "errors",
            "guard",
            "indexing",
            "keras_internals",
            "scopes",
        ),
        *("strategy", "whole_batch", "world"),
    },
    "a backend": {
        *("batches", "blockwise", "counting", "errors", "kernel"),
        *("keras_internals", "masks", "mesh", "native"),
        *("numerics", "padding", "step"),
        *("primitives", "random_bits", "scopes", "scoring", "scratch"),
        *("tiling", "placement", "shards", "strategy", "training"),
        *("transport", "visit", "world"),
    },
}
# The facade names everything.
MAY_IMPORT["__init__"] = set(MAY_IMPORT) - {"a backend"}

PRIVATE = (
    "keras.src",
    "keras._tf_keras",
    "tensorflow.python",
    "tf.python",
    "torch.ops.aten",
    "torch._",
    "jax._src",
    "jax.interpreters",
    "jaxlib",
)

# What the shared code asks of a backend, in the order of the files.
SEAM = {
    "transport.py": ["RingTransport"],
    "kernel.py": ["Kernel", "KERNEL", "KERNELS"],
    "runtime.py": [
        *("World", "current", "custom_gradient", "vjp", "exporting"),
        "install",
    ],
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part(path: Path) -> str:
    """The module or folder under keras_ring/ that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "a backend" if framework_of(path) else parts[0]


def framework_of(path: Path) -> str | None:
    """The framework whose backend a file is part of."""
    parts = path.relative_to(PACKAGE).parts
    return parts[1] if parts[0] == "backends" and len(parts) > 2 else None


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(
            node.test
        ):
            for other in node.orelse:
                yield from running_nodes(other)
            continue
        yield node
        yield from running_nodes(node)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    for node in running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_point_one_way(path):
    """layers, losses -> ops -> attention -> leaves; strategy -> backends."""
    own = part(path)
    assert own in MAY_IMPORT, f"say in MAY_IMPORT what {own} may import"
    for name in imported(parse(path)):
        if not name.startswith("keras_ring."):
            continue
        names = name.split(".")
        in_backend = names[1] == "backends" and names[2:3] != ["load"]
        target = "a backend" if in_backend and names[2:] else names[1]
        assert target == own or target in MAY_IMPORT[own], (
            f"{identify(path)} imports {name}"
        )


def test_no_part_imports_another_in_a_circle():
    """The table itself points one way."""
    done: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        ready = [name for name, needs in left.items() if needs - {name} <= done]
        assert ready, f"a circle among {sorted(left)}"
        for name in ready:
            done.add(name)
            del left[name]


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_a_framework_is_imported_by_its_own_backend_only(path):
    own = framework_of(path)
    for name in imported(parse(path)):
        framework = name.split(".")[0]
        if framework in FRAMEWORKS:
            assert framework == own, f"{identify(path)} imports {name}"
        for other in FRAMEWORKS:
            assert other == own or not name.startswith(
                f"keras_ring.backends.{other}"
            ), f"{identify(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_private_names_stand_in_a_backend_only(path):
    if framework_of(path) and path.name != "transport.py":
        return
    if path.name == "keras_internals.py":  # What it is for.
        return
    tree = parse(path)
    used = set(imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(
            node.func
        ):
            used.update(
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant)
            )
    found = [name for name in used if name.startswith(PRIVATE)]
    assert not found, f"{identify(path)} uses {found}"


def definitions(path: Path) -> dict[str, ast.stmt]:
    """Public names that a file defines at its top, in order."""
    names: dict[str, ast.stmt] = {}
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {t.id: node for t in node.targets if hasattr(t, "id")}
    return {n: d for n, d in names.items() if not n.startswith("_")}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("file", SEAM)
def test_every_backend_has_the_same_names_in_the_same_order(file, framework):
    names = definitions(PACKAGE / "backends" / framework / file)
    seam = [name for name in names if name in SEAM[file]]
    assert seam == SEAM[file]


@pytest.mark.parametrize("file", SEAM)
def test_the_methods_of_the_backends_are_in_one_order(file):
    """Those that two backends share; a diff then shows the framework."""
    methods = {}
    for framework in FRAMEWORKS:
        node = definitions(PACKAGE / "backends" / framework / file).get(
            SEAM[file][0]
        )
        assert isinstance(node, ast.ClassDef), framework
        methods[framework] = [
            n.name for n in node.body if isinstance(n, ast.FunctionDef)
        ]
    model = methods["jax"]
    for framework, names in methods.items():
        shared = [name for name in names if name in model]
        assert shared == [name for name in model if name in names], framework


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_shared_code_uses_the_seam_only(path):
    """`backend.kernel.x`: x is one of the names that every backend has."""
    if framework_of(path):
        return
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if not isinstance(owner, ast.Attribute):
            continue
        file = f"{owner.attr}.py"
        source = ast.unparse(owner.value)
        if file in SEAM and source in ("backend", "backends.load()"):
            assert node.attr in SEAM[file], (
                f"{identify(path)} uses {ast.unparse(node)}"
            )


def test_nobody_but_masks_asks_for_the_class_of_one():
    """So that a new mask is one class."""
    tree = parse(PACKAGE / "masks" / "__init__.py")
    classes = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } - {"Mask"}
    assert "Causal" in classes
    asked: set[ast.AST] = set()
    for path in FILES:
        if PACKAGE / "masks" in path.parents:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.MatchClass):
                asked.add(node.cls)
            elif isinstance(node, ast.Call) and (
                getattr(node.func, "id", "") in ("isinstance", "issubclass")
            ):
                asked.update(ast.walk(node.args[1]))
    named = {getattr(n, "id", getattr(n, "attr", "")) for n in asked}
    assert "Mask" in named  # It does find what is asked for.
    assert not named & (classes | {"Before"})


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_functions_say_their_types(path):
    """At the top of a module and in classes; inner functions may do without."""
    owners = [parse(path)]
    owners += [n for n in owners[0].body if isinstance(n, ast.ClassDef)]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = node.args
            given = [*arguments.posonlyargs, *arguments.args]
            given += [*arguments.kwonlyargs]
            given += [a for a in (arguments.vararg, arguments.kwarg) if a]
            if isinstance(owner, ast.ClassDef) and not any(
                ast.unparse(d) == "staticmethod" for d in node.decorator_list
            ):
                given = given[1:]
            where = f"{identify(path)}: {node.name}"
            assert all(a.annotation for a in given), where
            assert node.returns or node.name == "__init__", where


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(parse(path)) or not path.read_text().strip()


# They begin questions: "True if ...", "Number of ..." say what a thing is.
QUESTIONS = ("What", "Which", "Whether", "How", "Where", "When", "Who")


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_docstrings_begin_with_a_plain_sentence(path):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(parse(path)):
        if isinstance(node, kinds) and ast.get_docstring(node):
            first = ast.get_docstring(node).split()[0]
            assert first not in QUESTIONS, getattr(node, "name", "the module")


def test_unpublished_attributes_of_keras_are_read_in_one_place():
    for name in ("_flatten_layers", "_inbound_nodes"):
        found = [p.name for p in FILES if name in p.read_text("utf-8")]
        assert found == ["keras_internals.py"], name
