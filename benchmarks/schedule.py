"""What a scheduled XLA program does while a transfer is under way.

A text of `compiled.as_text()` with `is_scheduled=true` lists the
instructions of each computation in the order in which they are issued. A
transfer is `collective-permute-start` to `collective-permute-done`; what
stands in between runs meanwhile. A plain `collective-permute` is synchronous:
nothing runs meanwhile, and it is a transfer all the same.
"""

import dataclasses
import functools
import re

PRODUCTS = ("convolution", "dot")
SYNCHRONOUS = "nothing: it is synchronous"
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}

_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation|"
    r"branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    shape: str
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A transfer, and what runs meanwhile.

    Attributes:
        where: of the training step, in words.
        dtype: of what is sent.
        bytes: that are sent.
        products: matrix products between start and end.
        hides_behind: the instructions that hold them, in words.
    """

    where: str
    dtype: str
    bytes: int
    products: int
    hides_behind: str


def computations(text: str) -> dict[str, list[Instruction]]:
    """The program's computations by name, instructions in order."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0]
            current = found[name] = []
        elif line.startswith("  ") and " = " in line:
            name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
            shape, rest = _split_shape(rest)
            opcode, _, rest = rest.partition("(")
            current.append(Instruction(name, shape, opcode.strip(), rest))
    return found


def _split_shape(text: str) -> tuple[str, str]:
    """The type at the head of an instruction, and what follows it."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for place, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place:].lstrip()
    return text, ""


def transfers(text: str) -> list[Transfer]:
    """Every transfer between neighbours of a scheduled program."""
    if "is_scheduled=true" not in text:
        raise ValueError(
            "A program must be scheduled to tell what runs when. Received: "
            "a text without is_scheduled=true. Give the text of a compiled "
            "program."
        )
    found = computations(text)

    @functools.cache
    def products_of(computation: str) -> int:
        return sum(products_in(i) for i in found.get(computation, ()))

    def products_in(instruction: Instruction) -> int:
        own = instruction.opcode in PRODUCTS or (
            "tpu_custom_call" in instruction.rest
        )
        called = ",".join(_CALLED.findall(instruction.rest))
        names = re.findall(r"%[\w.\-]+", called)
        return own + sum(products_of(name) for name in names)

    result = []
    for name, instructions in found.items():
        for start, first in enumerate(instructions):
            if first.opcode == "collective-permute":
                dtype, size = _payload(first.shape)
                where = _where(first, _is_entry(name, instructions))
                result.append(Transfer(where, dtype, size, 0, SYNCHRONOUS))
            if first.opcode != "collective-permute-start":
                continue
            ended = next(
                place
                for place in range(start, len(instructions))
                if instructions[place].opcode == "collective-permute-done"
                and re.search(
                    re.escape(first.name) + r"\b(?!\.)",
                    instructions[place].rest.split(")")[0],
                )
            )
            between = instructions[start + 1 : ended]
            counts = [products_in(i) for i in between]
            kinds = [
                _in_words(i) for i, n in zip(between, counts, strict=True) if n
            ]
            dtype, size = _payload(first.shape)
            result.append(
                Transfer(
                    where=_where(
                        instructions[ended], _is_entry(name, instructions)
                    ),
                    dtype=dtype,
                    bytes=size,
                    products=sum(counts),
                    hides_behind=_counted(kinds) or "nothing",
                )
            )
    return result


def _is_entry(name: str, instructions: list[Instruction]) -> bool:
    return "main" in name and any(i.opcode == "while" for i in instructions)


def _payload(shape: str) -> tuple[str, int]:
    """Dtype and bytes of the first array of a tuple."""
    dtype, numbers = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shape)[0]
    size = BYTES.get(dtype, 4)
    for number in numbers.split(","):
        size *= int(number or 1)
    return dtype, size


def _in_words(instruction: Instruction) -> str:
    words = {"conditional": "a visit", "while": "a loop"}
    return words.get(instruction.opcode, "a product")


def _counted(kinds: list[str]) -> str:
    """`["a visit", "a product", "a product"]` as `a visit, a product (2)`."""
    counts = {kind: kinds.count(kind) for kind in kinds}
    return ", ".join(
        kind if count == 1 else f"{kind} ({count})"
        for kind, count in counts.items()
    )


def _where(instruction: Instruction, entry: bool) -> str:
    """Forward or backward, hop of the loop or one beside it."""
    name = _NAME.search(instruction.rest)
    text = name.group(1) if name else ""
    if "transpose(jvp(attention" in text:
        direction = "backward"
    elif "transpose(" in text:
        direction = "forward, again"
    else:
        direction = "forward"
    return f"{direction}, {'beside the loop' if entry else 'each hop'}"
