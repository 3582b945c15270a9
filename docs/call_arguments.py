"""The sections `Call arguments` of layers, for the API reference.

Keras' layers document the arguments of `call` in the class's docstring, under
a heading that Google style does not have. Here it becomes one that griffe
reads as parameters, under the same title.
"""

from typing import Any

from griffe import Class, Extension


class CallArguments(Extension):
    """Read `Call arguments` as a section of parameters."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Rename the section in the docstring of a class that was read."""
        if cls.docstring:
            cls.docstring.value = cls.docstring.value.replace(
                "\nCall arguments:\n", "\nOther Parameters: Call arguments:\n"
            )
