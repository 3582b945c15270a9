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

# What each part of the package may import of the others, from the bottom to
# the top. Parts are the folders of keras_ring/; "basics" are the modules that
# stand beside them. "a backend" is a folder under backends/, which the loader
# in backends/__init__.py finds by name, so that nothing but the loader stands
# between it and the code above. A new part needs a line.
MAY_IMPORT: dict[str, set[str]] = {
    "basics": set(),
    "masks": {"basics"},
    "distribution": {"basics"},
    "attention": {"basics", "distribution", "masks"},
    "recompute": {"basics", "distribution"},
    "ops": {"attention", "basics", "distribution", "masks", "recompute"},
    "layers": {
        *("attention", "basics", "distribution", "masks", "ops", "recompute"),
    },
    "losses": {"basics", "distribution", "layers", "masks", "ops"},
    "training": {"basics", "distribution", "layers", "ops"},
    "a backend": {
        *("attention", "basics", "distribution", "masks", "training"),
    },
}
# The facade names everything.
FACADE = set(MAY_IMPORT) - {"a backend"}

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
    ],
    "trainer.py": ["prepare", "install"],
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part(path: Path) -> str:
    """The part of the package that a file belongs to."""
    first, *rest = path.relative_to(PACKAGE).parts
    if first == "backends":
        return "a backend" if len(rest) > 1 else "basics"
    return first if rest else "basics"


def part_of(name: str) -> str:
    """The part that a dotted name under keras_ring belongs to."""
    names = name.split(".")
    folder = PACKAGE / names[1]
    if names[1] == "backends":
        loader = len(names) < 3 or not (folder / names[2]).is_dir()
        return "basics" if loader else "a backend"
    return names[1] if folder.is_dir() else "basics"


def framework_of(path: Path) -> str | None:
    """The framework whose backend a file is part of."""
    parts = path.relative_to(PACKAGE).parts
    return parts[1] if parts[0] == "backends" and len(parts) > 2 else None


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a file imports, anywhere in it, for a
    type checker alone too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_point_one_way(path):
    """layers, losses -> ops -> attention -> distribution -> basics."""
    if path == PACKAGE / "__init__.py":
        own, may = "the facade", FACADE
    else:
        own = part(path)
        assert own in MAY_IMPORT, f"say in MAY_IMPORT what {own} may import"
        may = MAY_IMPORT[own] | {own}
    for name in imported(parse(path)):
        if name.startswith("keras_ring."):
            assert part_of(name) in may, f"{identify(path)} imports {name}"


def test_no_part_imports_another_in_a_circle():
    """The table itself points one way."""
    assert in_order(MAY_IMPORT)


def test_no_module_imports_another_in_a_circle():
    """Not for a type checker alone either, nor inside of a function."""
    modules = {module_of(path): path for path in FILES}
    assert in_order(
        {
            name: {
                found
                for target in imported(parse(path))
                for found in (target, target.rpartition(".")[0])
                if found in modules and found != name
            }
            # `from package import module` asks for the module.
            - {
                target.rpartition(".")[0]
                for target in imported(parse(path))
                if target in modules
            }
            for name, path in modules.items()
        }
    )


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def in_order(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of a graph, each behind all that it needs."""
    done: list[str] = []
    left = dict(graph)
    while left:
        ready = [name for name, needs in left.items() if needs <= set(done)]
        assert ready, f"a circle among {sorted(left)}"
        for name in ready:
            done.append(name)
            del left[name]
    return done


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


@pytest.mark.parametrize("file", [f for f in SEAM if f != "trainer.py"])
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
    for name in (
        *("_flatten_layers", "_inbound_nodes", "_fn_kwargs"),
        *("_compile_loss", "_compile_metrics", "_loss_tracker"),
    ):
        found = [p.name for p in FILES if name in p.read_text("utf-8")]
        assert found == ["keras_internals.py"], name
