"""What griffe, which reads the sources for the API reference, is told."""

from typing import Any

from griffe import Alias, Class, Extension, GriffeLoader, Module


class CallArguments(Extension):
    """Read `Call arguments` as a section of parameters.

    Keras' layers document the arguments of `call` in the class's docstring,
    under a heading that Google style does not have. It becomes one that is
    read as parameters, under the same title.
    """

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Rename the section in the docstring of a class that was read."""
        if cls.docstring:
            cls.docstring.value = cls.docstring.value.replace(
                "\nCall arguments:\n", "\nOther Parameters: Call arguments:\n"
            )


class PublicNames(Extension):
    """Take a name that a package imports for what Python takes it for.

    `keras_ring.ops.ring_attention` is a function, and there is a module of
    that name, which griffe would show.
    """

    def on_package(
        self, *, pkg: Module, loader: GriffeLoader, **_: Any
    ) -> None:
        """Put functions and classes in the place of modules of their name."""
        # What is in these modules is not found by its path afterwards.
        loader.resolve_aliases()
        _unshadow(pkg)


def _unshadow(package: Module) -> None:
    for name, member in list(package.members.items()):
        if not isinstance(member, Module):
            continue
        _unshadow(member)
        exported = {str(export) for export in package.exports or ()}
        if name in exported and name in member.members:
            shown = member.members[name]
            package.members[name] = Alias(name, shown, parent=package)
