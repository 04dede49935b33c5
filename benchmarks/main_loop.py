"""The loop in which a kernel spends its time, found in its disassembly, and what stands in it.

Branches and labels of nvdisasm's listing give the control-flow graph, and each branch back to a
label that leads to it a natural loop: the label's block and all that reaches the branch without
passing the label. Waiting for a barrier is such a loop too, often out of line.

The main loop is chosen by rule. If any loop has matrix instructions, those loops are looked at;
else those with floating-point arithmetic; else those that access memory. Of them, innermost ones
only; of these the one with most of that kind, and of equals the first. (A causal attention has a
loop over whole tiles, then one over masked tiles with the same products: the first counts.)
"""

import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)(\S*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+|\$\S+):")
_TARGET = re.compile(r"`\((.+?)\)")
_JUMPS = {"BRA", "CALL", "JMP"}
_ENDS = {"EXIT", "RET", "BRX", "JMX"}

# Matrix products by a warp, by Hopper's warpgroup, and in Blackwell's tensor memory.
_MATRIX = re.compile(r"HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA|OMMA|DMMA|UTC\w*MMA")
_KINDS = {
    "special": re.compile(r"MUFU"),
    "fma": re.compile(r"FFMA2?|FMUL2?|FADD2?|FHADD|FHFMA|HFMA2|HMUL2|HADD2"),
    "shared": re.compile(r"LDS|STS|LDSM|STSM|ATOMS"),
    "copies": re.compile(r"LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP"),
    "global": re.compile(r"LDG|STG|LD|ST|ATOMG|REDG?"),
}
_CHOSEN_BY = (("matrix",), ("fma",), ("global", "copies", "shared"))


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        predicate: what must hold for it to take effect, or "".
        opcode: its name up to the first dot.
        modifiers: the rest of its name.
        operands: as they are written.
    """

    predicate: str
    opcode: str
    modifiers: str
    operands: str

    @property
    def kind(self) -> str:
        """What it counts as: "matrix", one of the kinds above, or ""."""
        if _MATRIX.fullmatch(self.opcode):
            return "matrix"
        if self.opcode == "HFMA2" and "RZ, RZ," in self.operands:
            return ""  # how a constant comes into a register
        return next((kind for kind, name in _KINDS.items() if name.fullmatch(self.opcode)), "")


@dataclass(frozen=True)
class MainLoop:
    """What one turn of the loop issues, each instruction once, taken or not.

    Attributes:
        instructions: all of them.
        matrix: matrix products.
        special: special functions (exponential, reciprocal, square root, tanh).
        fma: float additions and multiplications, packed ones counted once.
        shared: loads and stores of shared memory.
        copies: asynchronous copies between global and shared memory.
    """

    instructions: int
    matrix: int
    special: int
    fma: int
    shared: int
    copies: int


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of nvdisasm's listing, and the index that each label stands before.

    No-operations, which fill the end, are left out.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif (found := _LINE.match(line)) and found[2] != "NOP":
            code.append(Instruction(found[1] or "", found[2], found[3], found[4]))
    return code, labels


def find(code: list[Instruction], labels: dict[str, int]) -> MainLoop | None:
    """The main loop of a kernel, or None where no loop does anything but wait."""
    loops = _natural_loops(code, labels)
    counted = [(loop, Counter(code[i].kind for i in loop)) for loop in loops]
    for kinds in _CHOSEN_BY:
        amounts = [(loop, sum(counts[kind] for kind in kinds)) for loop, counts in counted]
        candidates = [(loop, amount) for loop, amount in amounts if amount]
        innermost = [
            (loop, amount)
            for loop, amount in candidates
            if not any(other < loop for other, _ in candidates)
        ]
        if innermost:
            loop, _ = max(innermost, key=lambda candidate: candidate[1])
            counts = Counter(code[i].kind for i in loop)
            names = ("matrix", "special", "fma", "shared", "copies")
            return MainLoop(len(loop), *(counts[name] for name in names))
    return None


def _natural_loops(code: list[Instruction], labels: dict[str, int]) -> list[frozenset[int]]:
    """The loops by the indices of their instructions, in the order of their first labels."""
    after = [_successors(index, code, labels) for index in range(len(code))]
    before: list[list[int]] = [[] for _ in code]
    for index, following in enumerate(after):
        for target in following:
            before[target].append(index)
    bodies: dict[int, set[int]] = {}
    for branch, head in _back_edges(after):
        body = bodies.setdefault(head, {head})
        waiting = [branch]
        while waiting:
            index = waiting.pop()
            if index not in body:
                body.add(index)
                waiting += before[index]
    return [frozenset(bodies[head]) for head in sorted(bodies)]


def _successors(index: int, code: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Where execution may go on. BSYNC is passed: the label it meets at follows it."""
    instruction = code[index]
    found = _TARGET.search(instruction.operands)
    target = labels.get(found[1]) if found and instruction.opcode in _JUMPS else None
    # A branch may also have its condition among the operands: BRA.U !UP0, `(.L_x_4).
    always = not instruction.predicate and (
        instruction.opcode in _ENDS
        or (instruction.opcode in {"BRA", "JMP"} and instruction.operands.startswith("`"))
    )
    following = [] if always else [index + 1]
    if target is not None:
        following.append(target)
    return [place for place in following if place < len(code)]


def _back_edges(after: list[list[int]]) -> list[tuple[int, int]]:
    """Edges to a place that a depth-first walk from the entry is still inside of.

    Compiled code enters a loop by its first label alone, so these do not depend on the walk.
    """
    edges: list[tuple[int, int]] = []
    entered, inside = {0}, {0}
    path = [(0, iter(after[0]))] if after else []
    while path:
        index, following = path[-1]
        target = next(following, None)
        if target is None:
            inside.discard(index)
            path.pop()
        elif target in inside:
            edges.append((index, target))
        elif target not in entered:
            entered.add(target)
            inside.add(target)
            path.append((target, iter(after[target])))
    return edges
