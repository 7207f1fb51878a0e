"""Which engine answers for the groups of a batch, and why."""

import contextlib
import math
import warnings

from keras_stab import keras_internals
from keras_stab.arguments import checked_count
from keras_stab.backend import devices
from keras_stab.backend import exchange
from keras_stab.backend import tracing
from keras_stab.gradients.grouping import grouping_for
from keras_stab.gradients.microbatch import microbatch
from keras_stab.gradients.one_pass.engine import one_pass
from keras_stab.gradients.one_pass.examination import examine
from keras_stab.gradients.one_pass.layout import Layout
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.plan import Plan
from keras_stab.gradients.rows import is_static
from keras_stab.gradients.rows import leaves
from keras_stab.memory import remembered

ENGINES = ("auto", "microbatch", "one_pass")

# Below this share of a stock step, one pass saves too little.
_WORTHWHILE = 0.05

# What was found out about a model, so that no step repeats it: `Examined`; for
# a number of rows the `Plan`; or why it was refused.
_FOUND = "group gradients"
_DRAWS = "draws random numbers"


def group_gradients(oracle, groups, engine="auto", rule="interleaved"):
    """The gradients of K groups of rows; their `plan` says how.

    Args:
        oracle: The `GradientOracle`.
        groups: Int, K over all devices.
        engine: One of `ENGINES`.
        rule: As in `grouping_for`.
    """
    checked_count("groups", groups, 1)
    grouping = grouping_for(rule, groups)
    answer, plan = _answer(oracle, grouping, engine)
    plan.groups = groups
    plan.grouping = grouping.rule
    plan.traffic = answer.traffic(
        sum(math.prod(v.shape) for v in oracle.variables),
        groups,
        grouping.aligned,
    )
    answer.plan = plan
    if devices.ranks() == 1:
        warn_of_empty_groups(oracle.model, answer)
    return answer


def warn_of_empty_groups(model, answer):
    """Warns once if the first batch has too few: a later one may be short."""
    size, groups = answer.rows, len(answer.sizes)
    known = remembered(model, _FOUND)
    if groups in known or not is_static(size):
        return
    known[groups] = True
    empty = sum(n == 0 for n in answer.sizes)
    if empty:
        warnings.warn(
            f"Each group needs a row: of {groups} groups {empty} are "
            "empty and take no part in the step. Use larger batches or fewer "
            f"groups. Received: groups={groups}, a batch of {size} rows",
            stacklevel=2,
        )


def _answer(oracle, grouping, engine):
    groups = grouping.groups
    if engine == "microbatch":
        plan = Plan("microbatch", "asked for", groups)
        apart = _rows_apart(oracle, grouping)
        return microbatch(oracle, grouping, apart), plan
    try:
        return _one_pass(oracle, grouping, engine)
    except Refusal as refusal:
        if engine == "one_pass":
            raise ValueError(
                'engine="one_pass" cannot give the group gradients of this '
                f'model: {refusal}. Use engine="auto" or "microbatch". '
                f"Received: model {oracle.model.name!r}"
            ) from refusal
        plan = Plan("microbatch", str(refusal), groups)
        apart = _rows_apart(oracle, grouping)
        return microbatch(oracle, grouping, apart), plan


def _rows_apart(oracle, grouping):
    """Whether devices may compute their parts of a group without the others.

    Where the model mixes no rows and the loss is a mean over them, which the
    one-pass engine finds out. Known once for a model.
    """
    if grouping.aligned or not exchange.computes_on_each_device():
        return False
    known = remembered(oracle.model, _FOUND)
    key = "rows apart", _key(oracle)
    if key not in known:
        known[key] = False
        layout = Layout(oracle.batch, grouping.groups, sorts=False)

        def ask(_):
            examined = examine(oracle)
            _, answer = one_pass(oracle, layout, examined)
            known[key] = answer.is_of_rows and not examined.by_group

        with contextlib.suppress(Refusal):
            tracing.traced(ask, [])
    return known[key]


def _one_pass(oracle, grouping, engine):
    groups = grouping.groups
    if devices.replicas() > 1:
        raise Refusal(
            "the replicas of tf.distribute exchange the gradients of all "
            "groups, which one pass does not form"
        )
    known = remembered(oracle.model, _FOUND)
    key = _key(oracle)
    # Rows that devices share stay where they are. But random numbers are drawn
    # row by row, and the groups are to get those of one device.
    moves = exchange.batch_shares() == 1 or exchange.sees_own_rows()
    sorts = moves or (_DRAWS, key) in known
    layout = Layout(oracle.batch, groups, sorts, grouping)
    size = layout.size if layout.is_static else None
    with _refused_once(known, key):
        if key not in known:
            known[key] = examine(oracle)
    key = key, size, groups, engine, grouping.rule
    with _refused_once(known, key):
        evaluation, answer = one_pass(oracle, layout, known[key[0]])
        if answer.draws and not sorts:
            known[_DRAWS, key[0]] = True
            return _one_pass(oracle, grouping, engine)
        if key not in known:
            plan = Plan("one_pass", "asked for", groups, answer.works())
            if engine == "auto":
                plan.reason = _preference(plan, known[key[0]])
            known[key] = plan
    oracle.record(evaluation)
    return answer, known[key]


@contextlib.contextmanager
def _refused_once(known, key):
    """Raises the `Refusal` of an earlier time again; keeps a new one."""
    if isinstance(known.get(key), Refusal):
        raise Refusal(str(known[key]))
    try:
        yield
    except Refusal as refusal:
        known[key] = Refusal(str(refusal))
        raise


def _key(oracle):
    inputs = leaves(oracle.batch[0])
    return (
        # As text: TensorFlow may not even know how many dimensions there are.
        tuple((str(t.shape[1:]), str(t.dtype)) for t in inputs),
        tuple(id(v) for v in oracle.variables),
        id(keras_internals.compile_loss(oracle.model)),
    )


def _preference(plan, examined):
    """Why one pass is the better choice.

    Raises:
        Refusal: If it is not.
    """
    if devices.EAGER:
        return "a loop over the groups would dispatch every operation K times"
    saved = sum(w.store + w.again - w.extra for _, w in plan.works)
    ordinary = sum(work.ordinary for _, work in plan.works)
    if saved > _WORTHWHILE * ordinary:
        return f"it saves {saved / ordinary:.0%} of the work of a stock step"
    # XLA joins the operations of a small batch; otherwise each is a launch.
    if examined.by_group and not devices.FUNCTIONAL:
        return "K small batches would normalise K times as often"
    one_pass, again = (
        sum(cost(work) for _, work in plan.works) / ordinary
        for cost in (lambda w: w.extra, lambda w: w.store + w.again)
    )
    raise Refusal(
        f"K small batches cost no more than one pass ({again:.0%} and "
        f"{one_pass:.0%} on top of a stock step), and less memory"
    )
