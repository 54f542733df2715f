"""PTX text to a list of instructions: as much of the language as Triton writes.

Names of registers become numbers, those of a ``{ ... }`` block of inline assembly among them; labels become positions.
Everything that the code holds is either understood or an error: a statement that is none of ours is never skipped.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator


class UnknownPtx(Exception):
    """A statement, or an instruction, that the executor does not know."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register of the kernel: its number, its width in bits (1 of a predicate), and its name in the text."""

    number: int
    bits: int
    name: str
    negated: bool = False  # of a predicate operand: !%p1


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``; no base where the offset is all."""

    base: "Register | Symbol | None"
    offset: int


@dataclasses.dataclass(frozen=True)
class Symbol:
    """What is neither register nor number: a special register (%tid.x), a parameter, a label, a shared variable."""

    name: str


# A number is an int as it stands, or the bits of a float (0f3F800000, 0d...) with their width.
@dataclasses.dataclass(frozen=True)
class Immediate:
    value: int
    float_bits: int = 0


Operand = Register | Address | Symbol | Immediate | tuple


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One statement: ``@guard opcode operands;``, and the line of the source that it was compiled from."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str
    source: str  # mingru.py:128, and where that was inlined


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[tuple[str, int], ...]  # name and bytes
    threads: int  # of a program
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # index of the instruction behind each
    undefined: frozenset[Register]  # registers that no instruction writes
    registers: tuple[Register, ...]
    shared: dict[str, int]  # offsets of shared variables
    shared_bytes: int  # of those whose size the text says


_BITS = {"pred": 1} | {f"{kind}{n}": n for kind in "busf" for n in (8, 16, 32, 64)}
_STATEMENT = re.compile(r"(?:@(!?)([%\w.$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
# What says something to an assembler or a debugger, and nothing to the machine.
_IGNORED = (".pragma",)


class _Scope:
    """Registers by name: those of the kernel, and those of the blocks inside of it."""

    def __init__(self) -> None:
        self.names: list[dict[str, Register]] = []
        self.registers: list[Register] = []

    def declare(self, kind: str, names: str) -> None:
        if kind not in _BITS:
            raise UnknownPtx(f"registers of type .{kind}")
        for name in names.split(","):
            many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
            for one in (f"{many[1]}{i}" for i in range(int(many[2]))) if many else (name.strip(),):
                self.names[-1][one] = Register(len(self.registers), _BITS[kind], one)
                self.registers.append(self.names[-1][one])

    def find(self, name: str) -> Register | None:
        return next((names[name] for names in reversed(self.names) if name in names), None)


def _split(text: str) -> Iterator[str]:
    """Operands: separated by commas outside of brackets."""
    depth = start = 0
    for i, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def _operand(text: str, scope: _Scope) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part, scope) for part in _split(text.strip("{}")))
    if text.startswith("["):
        inside = re.fullmatch(r"\[\s*([%\w.$]+?)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if inside is None:
            raise UnknownPtx(f"address {text}")
        base = _operand(inside[1], scope)
        offset = int(inside[2] or 0)
        return Address(None, base.value + offset) if isinstance(base, Immediate) else Address(base, offset)
    if "|" in text:
        return tuple(_operand(part.strip(), scope) for part in text.split("|"))
    if text.startswith("!"):
        return dataclasses.replace(scope.find(text[1:].strip()), negated=True)
    if number := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        return Immediate(int(number[2], 16), 32 if number[1] in "fF" else 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return scope.find(text) or Symbol(text)


def _sources(ptx: str) -> dict[str, str]:
    return {
        number: path.rpartition("/")[2]
        for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.MULTILINE)
    }


def _location(text: str, files: dict[str, str]) -> str:
    file, line, _ = text.split(",")[0].split()[:3]
    where = f"{files.get(file, file)}:{line}"
    if inlined := re.search(r"inlined_at\s+(\d+)\s+(\d+)", text):
        where += f", inlined at {files.get(inlined[1], inlined[1])}:{inlined[2]}"
    return where


def _statements(body: str) -> Iterator[str]:
    """Labels, blocks' braces, lines of .loc and what ends with a semicolon, in order."""
    # A brace that opens or closes a block begins a statement; those of vectors stand inside of one.
    token = re.compile(r"\s*(\.loc\s[^\n]*|\{|\}|[$%\w]+:(?=\s)|[^;]*;)", re.DOTALL)
    at = 0
    while body[at:].strip():
        found = token.match(body, at)
        if found is None:
            raise UnknownPtx(body[at:].strip().splitlines()[0])
        yield found[1].strip()
        at = found.end()


def _body(ptx: str, start: int) -> str:
    """From behind the brace at ``start`` to the one that closes it."""
    depth = 0
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return ptx[start + 1 : start + brace.start()]
    raise UnknownPtx("a kernel without an end")


def _targets(instruction: Instruction) -> tuple[Operand, ...]:
    """The registers that an instruction writes, if it writes any: its first operand, or the parts of that."""
    first = instruction.operands[0] if instruction.operands else ()
    return first if isinstance(first, tuple) else (first,)


def _shared(ptx: str) -> tuple[dict[str, int], int]:
    """Offsets of shared variables, one behind another, and the bytes of those that have a size."""
    offsets, end = {}, 0
    for align, width, name, count in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\[(\d*)\]", ptx):
        end = -(-end // int(align)) * int(align)
        offsets[name] = end
        end += int(count or 0) * int(width) // 8
    return offsets, end


@functools.lru_cache(maxsize=512)
def parse(ptx: str) -> Kernel:
    """The one kernel of a PTX module."""
    files = _sources(ptx)
    plain = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.DOTALL)
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\(", plain)
    if len(entries) != 1 or ".func" in plain:
        raise UnknownPtx(f"a module of the kernels {entries}" + (" and functions" if ".func" in plain else ""))
    head_end = plain.index("{", plain.index(".entry"))
    head = plain[plain.index(".entry") : head_end]
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*\s*$", head.strip())
    if threads is None:
        raise UnknownPtx(f"{entries[0]}: no .reqntid of one dimension")
    parameters = [
        (name, _BITS[kind] // 8) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,()]*?([\w$]+)\s*(?:,|\))", head)
    ]
    scope, code, labels, source = _Scope(), [], {}, "an unknown line"
    scope.names.append({})
    for statement in _statements(_body(plain, head_end)):
        if statement == "{":
            scope.names.append({})
        elif statement == "}":
            scope.names.pop()
        elif re.match(r"\.loc\s", statement):
            source = _location(statement[4:], files)
        elif statement.startswith(".reg"):
            _, kind, names = statement.rstrip(";").split(None, 2)
            scope.declare(kind.lstrip("."), names)
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif statement.startswith(_IGNORED):
            continue
        else:
            text = " ".join(statement.rstrip(";").split())
            found = _STATEMENT.fullmatch(text)
            if found is None:
                raise UnknownPtx(f"{entries[0]}, {source}: {text}")
            negated, name, opcode, operands = found.groups()
            guard = None
            if name is not None:
                guard = dataclasses.replace(scope.find(name), negated=bool(negated))
            parts = tuple(_operand(part, scope) for part in _split(operands))
            code.append(Instruction(opcode, parts, guard, text, source))
    shared, shared_bytes = _shared(plain)
    undefined = frozenset(scope.registers) - {x for instruction in code for x in _targets(instruction)}
    return Kernel(
        entries[0],
        tuple(parameters),
        int(threads[1]),
        tuple(code),
        labels,
        undefined,
        tuple(scope.registers),
        shared,
        shared_bytes,
    )
