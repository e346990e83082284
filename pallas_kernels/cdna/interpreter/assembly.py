"""Parses the assembly text of a kernel into directives and basic blocks of instructions."""

from __future__ import annotations

import dataclasses
import functools
import re


class InterpreterError(RuntimeError):
    """The interpreter rejects the code; the message names the line, the instruction and the fault."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of an instruction.

    Attributes:
      kind: "v", "a" or "s" (registers), "int", "float" (constants), "off", or "word" (labels, hwreg and the like).
      index: number of the first register.
      named: whether it is a scalar register with a name of its own, such as vcc.
      count: number of registers.
      value: value of a constant.
      negate, absolute, sign_extend: input modifiers.
      text: text of the operand in the source.
    """

    kind: str
    text: str
    index: int = 0
    count: int = 1
    value: float = 0
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False
    named: bool = False

    def register(self, offset: int) -> int:
        """Number of the register `offset` places behind the first.

        Raises:
          ValueError: the operand has fewer registers.
        """
        if offset >= self.count:
            raise ValueError(f"`{self.text}` has {self.count} registers, and the instruction needs {offset + 1}")
        return self.index + offset


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      opcode: name without its encoding suffix (`_e32`, `_e64`, `_sdwa`, `_dpp`).
      encoding: "sdwa", "dpp" or "".
      operands: operands in textual order, destinations first.
      modifiers: `key:value` pairs and flags (value True) after the operands.
      line: line number in the text, from 1.
      text: text of the instruction without comments.
    """

    opcode: str
    encoding: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, str | bool]
    line: int
    text: str

    def list_modifier(self, name: str) -> list[int] | None:
        """`name:[0,1]` as numbers, or None."""
        value = self.modifiers.get(name)
        return None if value is None else [int(x) for x in str(value)[1:-1].split(",")]

    def int_modifier(self, name: str) -> int:
        """`name:12` as a number; 0 if the modifier is absent."""
        return int(str(self.modifiers.get(name, "0")), 0)

    def error(self, what: str) -> InterpreterError:
        """An InterpreterError that names this line and instruction."""
        return InterpreterError(f"line {self.line}: `{self.text}`: {what}")


@dataclasses.dataclass(frozen=True)
class Block:
    """A basic block: only its last instruction may branch, wait at a barrier or end the program."""

    number: int
    instructions: tuple[Instruction, ...]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A parsed kernel.

    Attributes:
      name: name of the kernel; empty if the text has no label of a function.
      arch: "gfx942" or "gfx950".
      directives: values of the `.amdhsa_*` directives.
      blocks: basic blocks in textual order.
      labels: label to number of the block that it starts.
      entry: number of the block that executes first.
      lines: lines of the assembly text.
    """

    name: str
    arch: str
    directives: dict[str, int]
    blocks: tuple[Block, ...]
    labels: dict[str, int]
    entry: int
    lines: tuple[str, ...]

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions in textual order."""
        return [i for block in self.blocks for i in block.instructions]

    @functools.cached_property
    def highest(self) -> dict[str, tuple[int, Instruction]]:
        """By file of registers, "v", "a" and "s": how many the code names, and an instruction that names the last."""
        found: dict[str, tuple[int, Instruction]] = {}
        for i in self.instructions:
            for o in i.operands:
                if o.kind in ("v", "a", "s") and not o.named and o.index + o.count > found.get(o.kind, (0,))[0]:
                    found[o.kind] = o.index + o.count, i
        return found


VCC, M0, EXEC = 106, 124, 126
_SPECIAL = {
    "flat_scratch": (102, 2),
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
_OPCODE = re.compile(r"(v_|s_|ds_|global_|buffer_|flat_|scratch_)\w+")
# Directives that put bytes between the instructions: the disassembler's words for what it cannot read.
_DATA = re.compile(r"\.(byte|short|word|long|quad|octa|int|fill|zero|ascii|asciz|string)\b")
_REGISTER = re.compile(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])")
_KEYED = re.compile(r"\b([a-z_]\w*):(\[[^\]]*\]|swizzle\([^)]*\)|[-\w]+)")
_FLAG = re.compile(r"\b(offen|idxen|glc|slc|sc0|sc1|nt|lds|gds|clamp|row_mirror|row_half_mirror)\b")
_ENDS_BLOCK = re.compile(r"s_(branch|cbranch_\w+|endpgm\w*|barrier|setpc_b64|swappc_b64)")
# Instructions without effect on results. Their operands (counters, priorities) are not parsed.
NO_EFFECT = {
    *("s_waitcnt", "s_waitcnt_vmcnt", "s_waitcnt_lgkmcnt", "s_nop", "v_nop", "s_sleep", "s_setprio"),
    *("s_sched_barrier", "s_icache_inv", "s_dcache_inv", "s_dcache_wb", "s_inst_prefetch", "s_ttracedata"),
    *("buffer_inv", "buffer_wbl2", "s_setreg_b32", "s_setreg_imm32_b32"),
}


@functools.lru_cache(maxsize=65536)
def parse_operand(text: str) -> Operand:
    """Parses one operand with its modifiers."""
    body, negate, absolute, sign_extend = text, False, False, False
    if body.startswith("sext("):
        sign_extend, body = True, body[5:-1]
    if body.startswith("neg("):
        negate, body = True, body[4:-1]
    elif body.startswith("-") and not re.match(r"-[\d.]", body):
        negate, body = True, body[1:]
    if body.startswith("|"):
        absolute, body = True, body[1:-1]
    elif body.startswith("abs("):
        absolute, body = True, body[4:-1]
    make = functools.partial(Operand, text=text, negate=negate, absolute=absolute, sign_extend=sign_extend)
    register = _REGISTER.fullmatch(body)
    if register:
        file, single, first, last = register.groups()
        count = 1 if single else int(last) - int(first) + 1
        if count < 1:
            raise ValueError(f"`{text}` ends before it begins")
        return make(file, index=int(single or first), count=count)
    if body in _SPECIAL:
        index, count = _SPECIAL[body]
        return make("s", index=index, count=count, named=True)
    if body in ("off", "null"):
        return make("off")
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", body):
        return make("int", value=int(body, 0))
    if re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", body):
        return make("float", value=float(body))
    return make("word")


def _split(text: str) -> list[str]:
    """Splits operands at commas and spaces outside brackets."""
    parts, depth, word = [], 0, ""
    for c in text:
        depth += (c in "[(") - (c in "])")
        if depth == 0 and c in ", \t":
            parts.append(word)
            word = ""
        else:
            word += c
    return [p for p in [*parts, word] if p]


def parse_instruction(text: str, line: int) -> Instruction:
    """Parses one instruction; `text` has neither label nor comment."""
    mnemonic, _, rest = text.partition(" ")
    encoding = next((e for e in ("sdwa", "dpp") if mnemonic.endswith("_" + e)), "")
    opcode = re.sub(r"(_e32|_e64)?(_e32|_e64|_sdwa|_dpp)$", "", mnemonic)
    if opcode in NO_EFFECT:
        return Instruction(opcode, "", (), {}, line, text)
    modifiers: dict[str, str | bool] = {}

    def keyed(match):
        modifiers[match[1]] = match[2]
        return ""

    def flag(match):
        modifiers[match[1]] = True
        return ""

    rest = _KEYED.sub(keyed, rest)
    if not opcode.startswith("s_"):
        rest = _FLAG.sub(flag, rest)
    return Instruction(opcode, encoding, tuple(parse_operand(p) for p in _split(rest)), modifiers, line, text)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Assembly:
    """Parses the assembly of one kernel.

    Raises:
      InterpreterError: the target directive is missing, a line is no instruction, or a branch names an undefined label.
    """
    target = re.search(r'\.amdgcn_target\s+"[^"]*-(gfx\d[0-9a-f]+)', text)
    if not target:
        raise InterpreterError("the assembly has no .amdgcn_target directive, so its instruction set is unknown")
    lines = tuple(text.splitlines())
    groups: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for number, raw in enumerate(lines, 1):
        line = re.split(r";|//", raw, maxsplit=1)[0].strip()
        start = re.match(r"([.\w$]+):", line)
        if start:
            if groups[-1]:
                groups.append([])
            labels[start[1]] = len(groups) - 1
            continue
        if not line or (line[0] == "." and not _DATA.match(line)):
            continue
        if not _OPCODE.match(line):
            raise InterpreterError(f"line {number}: `{line}`: this is no instruction")
        try:
            instruction = parse_instruction(line, number)
        except ValueError as error:
            raise InterpreterError(f"line {number}: `{line}`: {error}") from None
        groups[-1].append(instruction)
        if _ENDS_BLOCK.fullmatch(instruction.opcode):
            groups.append([])
    for group in groups:
        for i in group:
            if i.opcode.startswith(("s_branch", "s_cbranch")):
                label = i.operands[0].text if i.operands else ""
                if label not in labels:
                    raise i.error(f"no label {label}")
    names = [n for n in labels if not re.fullmatch(r"\..*|L\d+", n)]
    return Assembly(
        name=names[0] if names else "",
        arch=target[1],
        directives={k: int(v, 0) for k, v in re.findall(r"\.amdhsa_(\w+)\s+(\w+)", text) if v[0].isdigit()},
        blocks=tuple(Block(i, tuple(g)) for i, g in enumerate(groups)),
        labels=labels,
        entry=labels[names[0]] if names else 0,
        lines=lines,
    )


CLASSES = ("vector", "matrix", "scalar", "memory read", "memory write", "LDS", "branch", "wait")


def classify(opcode: str) -> str:
    """The class of an instruction, one of CLASSES."""
    if opcode in ("s_waitcnt", "s_nop", "s_barrier", "s_sleep", "s_setprio", "s_sched_barrier"):
        return "wait"
    if opcode.startswith("v_mfma"):
        return "matrix"
    if opcode.startswith("v_"):
        return "vector"
    if opcode.startswith("ds_"):
        return "LDS"
    if opcode.startswith(("s_load", "s_buffer_load")):
        return "memory read"
    if opcode.startswith("s_"):
        return "branch" if _ENDS_BLOCK.fullmatch(opcode) else "scalar"
    return "memory write" if "_store" in opcode else "memory read"
