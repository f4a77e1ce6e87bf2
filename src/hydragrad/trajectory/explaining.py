"""What differs between a replay and its recording, in words: what was expected, likely causes, what to do."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hydragrad.errors import message
from hydragrad.trajectory.agreement import farthest
from hydragrad.trajectory.digests import batch_digests, describe_batch
from hydragrad.trajectory.outlived import Suspicion
from hydragrad.trajectory.state import State, StepRecord

_BETWEEN = (
    "; or something else than the recorded optimizer changed parameters or its state between this step and the last: "
    "another optimizer, clamping, re-initialisation, weights loaded or averaged; or the loop changed an attribute of "
    "the model (a temperature, a dropout rate)"
)
_SEARCHED = 20_000  # examples looked through for the place a recorded example moved to


def explain_gradient(
    step: StepRecord,
    replayed: Tensor,
    unknown: int,
    otherwise: Sequence[str] = (),
    suspected: Suspicion | None = None,
    *,
    compiled: bool = False,
) -> str:
    """A refusal's message for a replayed gradient that is not the recorded one, nor were perhaps ``unknown`` before.

    ``otherwise``: how this process differs from the recording's; ``suspected``: what is told first; ``compiled``: the
    model was compiled there.
    """
    assert step.fingerprint is not None
    a, b = step.fingerprint.to("cpu", torch.float64), replayed.to("cpu", torch.float64)
    ratio = float(b[0] / a[0]) if float(a[0]) else float("inf")
    at = f"{step.index} (the {unknown} before it were not noted)" if unknown else f"{step.index}"
    gap = (b[1:] - ratio * a[1:]).abs()
    close = 1e-2 * min(1.0, 10 * abs(ratio - 1)) * (ratio * a[1:]).abs() + 1e-6 * b[0]
    if 0 < ratio < float("inf") and abs(ratio - 1) > 1e-6 and bool((gap <= close).all()):
        factor, word = (ratio, "larger") if ratio > 1 else (1 / ratio, "smaller")
        cause, remedy = _scale_cause(factor, ratio > 1, len(step.batches[0]))
        summary = f"the replayed gradient at step {at} is {factor:.4g} times {word} than the recorded one"
    else:
        summary = f"the replayed gradient at step {at} differs from the recorded one"
        if not step.random:
            summary = f"the replayed gradient at step {at} differs from the recorded one, not only in scale"
        cause, remedy = _other_cause(bool(step.random), compiled)
    if suspected is not None:
        cause, remedy = f"{suspected.cause}; or {cause}", f"{suspected.remedy}; else {remedy}"
    expected, got = _told(a), _told(b)
    cause = "; or ".join([cause + (_BETWEEN if step.index else ""), *otherwise])
    return message(summary, expected=expected, got=got, cause=cause, remedy=remedy)


def _other_cause(random: bool, compiled: bool) -> tuple[str, str]:
    """Cause and remedy of a gradient that is another one, of a step that drew random numbers, of a compiled model."""
    if random and compiled:
        return (
            "the model was compiled when it trained, and compiled dropout draws other numbers from the same state than "
            "the replay, which is not compiled; or random numbers were drawn otherwise than in the loss given here",
            "record with torch.compile(model, backend='eager') or 'aot_eager', or after "
            "torch._inductor.config.fallback_random = True",
        )
    if random:
        return (
            "random numbers were drawn inside the step otherwise than in the loss given here (noise or mixup in the "
            "loop itself), or from a generator of one's own",
            "draw them inside loss(model, batch), from the global generators of torch, numpy or Python",
        )
    return (
        "another loss or model code than in the recorded loop, a penalty in the loop's loss (penalty=), or "
        "gradients changed before the step (clipped by torch's own function)",
        "give the loss that was trained, per example, and the model's code as it was; clip by "
        "recording.clip_grad_norm_ or recording.clip_grad_value_",
    )


def explain_left(step: StepRecord, replayed: Tensor) -> str:
    """A refusal's message for a recorded gradient that holds that of the step before as well."""
    assert step.fingerprint is not None
    return message(
        f"the recorded gradient at step {step.index} is the replayed one with that of step {step.index - 1} added",
        expected=_told(step.fingerprint),
        got=_told(replayed),
        cause="did the loop forget zero_grad? Gradients add up until they are zeroed",
        remedy="call optimizer.zero_grad() once for every step, and record again; gradients may add up over the "
        "batches of one step, not over steps",
    )


def _told(fingerprint: Tensor) -> str:
    norm, *projections = fingerprint.tolist()
    return f"norm {norm:.6g}, projections {projections[0]:.6g}, {projections[1]:.6g}"


def explain_drift(step: StepRecord, difference: float, since: tuple[int, float], otherwise: Sequence[str]) -> str:
    """A refusal's message for a gradient that rounding led away: at earlier steps it was a little different.

    ``since``: the first such step and its difference; ``otherwise``: how this process differs from the recording's.
    """
    threads = any("thread" in words for words in otherwise)
    return message(
        f"the replay drifted away from the recorded run: at step {step.index} its gradient is another one",
        expected="the recorded gradients, but for rounding",
        got=f"off by {since[1]:.1e} (relative) at step {since[0]}, by {difference:.1e} at step {step.index}",
        cause=("; ".join(otherwise) or "another machine, or kernels that are not deterministic")
        + ", and a run that amplifies rounding (chaotic training); or a loss that is a little different",
        remedy="torch.set_num_threads(...) as in the recording, before hydragrad.load"
        if threads
        else "replay where the run was recorded; hydragrad.verify says more",
    )


def _scale_cause(factor: float, larger: bool, examples: int) -> tuple[str, str]:
    whole = round(factor) > 1 and abs(factor - round(factor)) < 1e-3 * factor
    if whole and round(factor) == examples and examples > 1:
        did, give = ("mean", "sum") if larger else ("sum", "mean")
        return (
            f"the factor is the batch size: did the loop take the {did} of the losses?",
            f"give reduction={did!r} (not {give!r})",
        )
    if whole and larger and round(factor) <= 64:
        return (
            "did the loop divide the loss by accumulation steps?",
            "give a reduction that divides too: reduction=lambda batch, shape: "
            f"torch.tensor(1 / (shape.numel() * {round(factor)}))",
        )
    if whole and round(factor) <= 64:
        return (
            "did the loop multiply the loss, or take sums or means over other examples than the batch?",
            "give a reduction with the loop's own coefficients: (batch, shape) -> coefficients",
        )
    return (
        "a weighted or masked mean (cross_entropy(weight=, ignore_index=)), loss scaling, or gradient clipping between "
        "backward and step by torch's own function",
        "clip by recording.clip_grad_norm_ (same arguments), or give a reduction with the loop's own scale: "
        "(batch, shape) -> coefficients, such as those of a mean by weights: weight_of_each / weights.sum()",
    )


def explain_data(
    fetch: Callable[[Tensor], Any],
    length: int,
    ids: Tensor,
    recorded: Tensor,
    batch: Any,
    leaves: list[dict[str, Any]],
    step: int,
    collate_draws: Callable[[], bool],
) -> str:
    """A refusal's message for examples that are not the recorded ones.

    ``fetch``: ids -> fresh batch; ``collate_draws``: whether collate_fn makes other content each time.
    """
    given = batch_digests(batch, len(ids)).cpu()
    wrong = (given != recorded.cpu()).nonzero().flatten()
    names = f"{len(wrong)} of the {len(ids)} examples at step {step} differ from the recorded ones"
    now = describe_batch(batch)
    if leaves and now != leaves:
        before, after = next(
            ((a, b) for a, b in zip(leaves, now, strict=False) if a != b), (f"{len(leaves)} parts", f"{len(now)} parts")
        )
        return message(
            f"the data has another form than the recorded one: {names}",
            expected=_form(before),
            got=_form(after),
            cause="another dtype, transform or collate function",
            remedy="give the data set and collate_fn of the recorded loop",
        )
    again = not torch.equal(batch_digests(fetch(ids), len(ids)).cpu(), given)
    if again and collate_draws():
        return message(
            f"collate_fn gives other content each time it is asked: {names}",
            cause="random numbers in collate_fn (mixup, random masks)",
            remedy="draw them in the loss, for training alone (`if model.training:` mix the batch by torch's numbers), "
            "or record with keep_batches=True and give hydragrad.load a collate_fn that draws none",
        )
    if again:
        return message(
            f"the data set gives other content each time it is asked: {names}",
            cause="random augmentation in the data set",
            remedy="wrap it for recording and loading: train_set = hydragrad.Augmented(train_set), or record with "
            "keep_batches=True",
        )
    place = int(wrong[0])
    moved = _find(fetch, length, len(ids), int(recorded[place]))
    if moved is not None:
        return message(
            f"the order of the data differs: recorded example {int(ids[place])} looks like example {moved} of the "
            f"given data; {names}",
            cause="the data set was shuffled, sorted, filtered or split in another way",
            remedy="give the data in the order in which it was recorded",
        )
    return message(
        f"the content of the data changed: {names}, the first is example {int(ids[place])}",
        cause="another version of the data, other preprocessing or labels",
        remedy="give the very data set of the recorded run",
    )


def _form(leaf: Any) -> str:
    if isinstance(leaf, str):
        return leaf
    return f"{leaf['path'] or 'the batch'}: {leaf['dtype']} of shape {leaf['shape']} per example"


def _find(fetch: Callable[[Tensor], Any], length: int, examples: int, digest: int) -> int | None:
    """The example of the given data with this digest, if it is among the first ones and digests are per example."""
    for start in range(0, min(length, _SEARCHED), examples):
        ids = torch.arange(start, min(start + examples, length))
        try:
            found = (batch_digests(fetch(ids), len(ids)).cpu() == digest).nonzero().flatten()
        except Exception:  # the user's data may fail anywhere; the refusal matters more than this hint
            return None
        if len(found):
            return int(ids[int(found[0])])
    return None


def explain_state(recorded: State, replayed: State, since: int) -> str:
    """A refusal's message for a state that the steps since ``since`` do not make, though their gradients are equal.

    (Those that were noted are: see ``sparing``.)
    """
    apart, kind, name = farthest(recorded, replayed)
    if kind == "buffer":
        cause = (
            "a forward pass in training mode beside the recorded batches (a validation pass without "
            "model.eval()), batches that the loop changed before the model saw them, or an attribute of a layer that "
            "the loop changed or that differs in the model given here (BatchNorm's momentum)"
        )
        remedy = (
            "call model.eval() before such passes and model.train() after them, leave such attributes as they are, and "
            "record again"
        )
    else:
        cause = (
            "something else than the recorded optimizer changed it: another optimizer, clamping, re-initialisation, "
            "weights loaded or averaged; or gradients were changed by hand at a step of which none was noted"
        )
        remedy = (
            "give all parameters to one optimizer, and change them by its steps alone inside the `with` block; load "
            "the best weights after it, and ask for their step (step=)"
        )
    return message(
        f"the state at step {recorded.step} is not what the recorded steps make of the state at step {since}: "
        f"{kind} {name!r} differs",
        expected="the recorded state, since every gradient noted between them is the recorded one bit for bit",
        got=f"{kind} {name!r}, {apart:.2g} relative away from it",
        cause=cause,
        remedy=remedy,
    )
