"""What an engine does for a model, and the predicted cost."""

from keras_stab.backend import devices
from keras_stab.text_table import as_text


class Plan:
    """Which engine answers, why, and what it does in each layer.

    `str(plan)` is a table, and so is what an interactive session shows.

    Attributes:
        engine: `"one_pass"`, `"microbatch"` or, for groups of losses,
            `"one_forward"`.
        reason: Why, a string.
        groups: K.
        works: Pairs of a variable's path and its predicted `Work`; of
            `"one_pass"` alone.
        grouping: `"interleaved"`, `"contiguous"` or `"losses"`.
        traffic: What devices that share a batch exchange: `devices`, how many
            they are, `form`, and what each sends in a step, `bytes`, beside
            `plain_bytes` for a mean gradient.
        step_ratio: Predicted time of a step over that of the inner optimizer
            alone, from operations, multiply-adds and memory traffic counted
            in both and what each takes on this machine; `None` where only
            steps were made, which count nothing, and for several devices.
    """

    grouping = "interleaved"
    traffic = None

    def __init__(self, engine, reason, groups, works=()):
        self.engine = engine
        self.reason = reason
        self.groups = groups
        self.works = [(variable.path, work) for variable, work in works]
        self.step_ratio = None

    @property
    def extra_work(self):
        """Predicted work beyond a stock step, as a share of that."""
        ordinary = sum(work.ordinary for _, work in self.works)
        extra = sum(work.extra for _, work in self.works)
        return extra / ordinary if ordinary else 0.0

    @property
    def bytes(self):
        """Memory held for the groups until they are combined."""
        return sum(work.bytes for _, work in self.works)

    @property
    def host_reads(self):
        """How often a step waits for an accelerator to read from it."""
        # The inner products, for the K x K problem; see `on_small_matrix`.
        return 1 if devices.EAGER else 0

    def __str__(self):
        lines = [
            f"{self.groups} groups by engine {self.engine!r}: {self.reason}",
            f"grouping {self.grouping!r}",
        ]
        if self.traffic is not None:
            lines[-1] += f"; {self.traffic}"
        if self.works:
            lines.append(_table(self.works))
            lines.append(
                f"predicted: {self.extra_work:.0%} more multiply-adds in "
                f"layers with weights, {self.bytes / 2**20:.1f} MiB held"
            )
        if self.step_ratio is not None:
            lines.append(
                f"predicted time of a step: {self.step_ratio:.2f} of a step of "
                "the inner optimizer alone"
            )
        reads = f"reads of the host in a step: {self.host_reads}"
        if self.host_reads:
            reads += f", the {self.groups} x {self.groups} inner products"
        return "\n".join([*lines, reads])

    # So that `optimizer.plan(...)` alone shows it in a notebook.
    __repr__ = __str__


def _table(works):
    columns = ("variable", ">N", ">d", ">p", "choice", ">extra MFLOP", ">MiB")
    return as_text(
        columns,
        (
            (
                path,
                str(work.tokens),
                str(work.inputs),
                str(work.outputs),
                work.choice,
                f"{2e-6 * work.extra:.2f}",
                f"{work.bytes / 2**20:.2f}",
            )
            for path, work in works
        ),
    )
