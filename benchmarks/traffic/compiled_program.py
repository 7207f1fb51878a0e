"""Reads the program that XLA compiled for one of several devices."""

import math
import re

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)"
)
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)"
    r"=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Program:
    """The text of a compiled program, by instruction."""

    def __init__(self, text):
        self._instructions = []
        self._shapes = {}
        calls = {}
        loops = {}
        computation = None
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                computation = head[1]
                continue
            if not (found := _INSTRUCTION.match(line)):
                continue
            name, shape, kind, rest = found.groups()
            self._shapes[name] = shape
            self._instructions.append((computation, shape, kind, rest))
            called = _CALLED.findall(rest)
            if branches := _BRANCHES.search(rest):
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            for other in called:
                calls[other] = computation
            if kind == "while":
                body = re.search(r"body=%?([\w.\-]+)", rest)[1]
                count = re.search(r'known_trip_count"?:\{"n":"(\d+)"', rest)
                loops[body] = int(count[1]) if count else 1
        self._calls = calls
        self._loops = loops

    def collectives(self):
        """Triples of kind, number and bytes of results, loops unrolled."""
        answer = []
        for computation, shape, kind, _ in self._instructions:
            kind = kind.removesuffix("-start")
            if kind in COLLECTIVES:
                times = self._times(computation)
                answer.append((kind, times, times * size_of(shape)))
        return answer

    def rows_of_products(self, inputs, outputs):
        """Rows of all matrix products from one length to another.

        Rows of the left factor, which may have several axes, times the number
        of runs in a step.
        """
        total = 0
        for computation, shape, kind, rest in self._instructions:
            if kind != "dot":
                continue
            result = dimensions(shape)
            left, right = re.findall(r"%([\w.\-]+)", rest)[:2]
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
            left = dimensions(self._shapes[left])
            summed = math.prod(left[int(a)] for a in axes.split(",") if a)
            if summed == inputs and result[-1] == outputs:
                total += self._times(computation) * math.prod(result[:-1])
            elif summed == inputs and result[0] == outputs:
                total += self._times(computation) * math.prod(result[1:])
        return total

    def _times(self, computation):
        """How often a computation runs, by the loops around it."""
        times = 1
        seen = set()
        while computation is not None and computation not in seen:
            seen.add(computation)
            times *= self._loops.get(computation, 1)
            computation = self._calls.get(computation)
        return times


def dimensions(shape):
    """Of an array, by its type in the program: `f32[4,8]{1,0}`."""
    return [int(n) for n in _SHAPE.search(shape)[2].split(",") if n]


def size_of(shape):
    """Bytes of an array or of a tuple of arrays."""
    return sum(
        BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in _SHAPE.findall(shape)
    )
