"""What a run finds out about itself before its first step, in plain words. A check is a value; nothing here decides."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rljax import decoding, hosts
from rljax.errors import UserError
from rljax.filters import Sampling
from rljax.logprobs import token_logps
from rljax.policy import Policy
from rljax.types import Metrics, PreferenceBatch, Rollout, Tokens
from rljax.views import decoder_params

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.05}  # nats a token, between two ways to compute it
VISIBLE = 0.01  # nats a token: a part of a clip range of 0.2 that one would rather not give away


class Check(NamedTuple):
    passed: bool
    said: str
    note: bool = False  # passed, and unusual
    name: str = ""  # by which it can be waived


NAMES: list[str] = []  # of the checks that can fail


def named(check: Callable[..., Check]) -> Callable[..., Check]:
    """A check with the name of its function."""
    NAMES.append(check.__name__)

    @functools.wraps(check)
    def with_name(*args: Any, **kwargs: Any) -> Check:
        return check(*args, **kwargs)._replace(name=check.__name__)

    return with_name


def waived(names: str) -> tuple[str, ...]:
    """The checks that a run's `waive` names, a,b,c. UserError for a name that no check has."""
    asked = tuple(name.strip().replace("-", "_") for name in names.split(",") if name.strip())
    unknown = [name for name in asked if name not in NAMES]
    if unknown:
        raise UserError(f"waive={names!r}: there is no check {', '.join(unknown)}; they are {', '.join(NAMES)}")
    return asked


def report(checks: Sequence[Check], say: Callable[[str], None], waive: str = "") -> bool:
    """Say what was found; whether all is well, but for the checks that `waive` names."""
    names = waived(waive)
    for check in checks:
        passed, let = check.passed, check.name in names
        say(f"{'✓•'[check.note] if passed else '✗'} {'' if passed or not let else '(waived) '}{check.said}")
    return all(check.passed or check.name in names for check in checks)


def require(checks: Sequence[Check], say: Callable[[str], None], waive: str = "") -> None:
    """`report`, and a UserError that names the checks that failed."""
    if not report(checks, say, waive):
        failed = ",".join(check.name for check in checks if not check.passed and check.name not in waived(waive))
        raise UserError(
            f"a check failed (above): mend its cause, or train all the same with --waive {failed} "
            "(--no-checks leaves out all checks)"
        )


@named
def trained_tokens(tokens: Tokens, tokenizer: Any, stop_ids: tuple[int, ...], *, budget: int | None = None) -> Check:
    """Something is trained, prompts are not, and stop tokens are; shown on one decoded row.

    budget: the most trained tokens of a row. Rows that fill it, or all columns, were cut, and have no end to train.
    """
    ids, segments, mask = (np.asarray(x) for x in (tokens.ids, tokens.segments, tokens.mask))
    real, some = (segments > 0).any(1), mask.any(1)
    first = int(np.argmax(some))  # a row that trains something, where there is one
    shown = f"the trained tokens of a row, in ⟦ ⟧: {marked(ids[first], segments[first], mask[first], tokenizer)}"
    untrained = int((real & ~some).sum())
    idle = f"{untrained} of {real.sum()} rows train no token: their completions are empty or cut off"
    if untrained == real.sum():
        return Check(False, f"{idle}\n{shown}")
    if (mask & (segments == 0)).any() or mask[:, 0].any():
        return Check(False, f"padding or the first token of a row is trained, which nothing predicts\n{shown}")
    stops = int((np.isin(ids, stop_ids) & mask).any(1).sum())
    full = (segments > 0).all(1) | (mask.sum(1) >= (budget or mask.shape[1]))
    names = tokenizer.convert_ids_to_tokens(list(stop_ids))
    if not stops and not full[some].all():
        return Check(
            False,
            f"no row trains a stop token ({names}), also those that are not cut: the policy would not learn to stop. "
            f"The tokenizer or the chat template may name another end token.\n{shown}",
        )
    said = f"{mask.sum()} of {(segments > 0).sum()} tokens are trained, a stop token in {stops} of {real.sum()} rows"
    said += "" if stops else f": all are cut at the row's end, so that nothing here teaches to stop ({names})"
    return Check(True, f"{said}{f'; {idle}' if untrained else ''}; {shown}", note=bool(untrained or not stops))


def marked(ids: np.ndarray, segments: np.ndarray, mask: np.ndarray, tokenizer: Any) -> str:
    """A row as text, its trained stretches in ⟦ ⟧."""
    ids, mask = ids[segments > 0], mask[segments > 0]
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    found = ""
    for start, end in itertools.pairwise(edges):
        text = decoding.continuation(tokenizer, ids[:start], ids[start:end], special=True)
        found += f"⟦{text}⟧" if end > start and mask[start] else text
    return found


@named
def companions(policy: Policy, tokens: Tokens) -> Check:
    """Log-probabilities do not depend on where the padding is, or on the other rows of the batch."""
    tokens = jax.tree.map(np.asarray, tokens)
    moved = _moved(tokens)
    logps = jax.jit(functools.partial(token_logps, policy.model))
    here, there = (hosts.whole(logps(policy.params, some)) for some in (tokens, moved))
    there = there[::-1]
    rows = np.asarray(moved.segments[::-1] > 0).any(1)
    worst = max(
        (
            float(np.abs(here[i][tokens.mask[i]] - there[i][np.asarray(moved.mask)[::-1][i]]).max(initial=0))
            for i in np.flatnonzero(rows)
        ),
        default=0.0,
    )
    return _within(policy, worst, "log-probabilities of a row with its padding moved and half its companions gone")


def _moved(tokens: Tokens) -> Tokens:
    """Rows in reverse order, padding on the left, every second row emptied."""

    pads_first = np.argsort(tokens.segments > 0, axis=1, kind="stable")

    def right_aligned(x: Any) -> np.ndarray:
        return np.take_along_axis(np.asarray(x), pads_first, axis=1)[::-1]

    gone = (np.arange(len(tokens.ids)) % 2 == 1)[::-1, None]
    ids, segments, mask = (right_aligned(x) for x in (tokens.ids, tokens.segments, tokens.mask))
    arrays: dict[str, Any] = {"ids": ids, "segments": np.where(gone, 0, segments), "mask": mask & ~gone}
    return Tokens(**arrays)


@named
def first_loss(run: Any, metrics: Metrics, batch: PreferenceBatch) -> Check:
    """The policy is the reference: log-ratios 0, and the loss what the formula says for that (DPO: ln 2)."""
    loss = float(metrics["loss"].value())
    if not run.reference:
        return Check(bool(np.isfinite(loss)), f"the loss of the first batch is {loss:.4f} (no reference in it)")
    chosen, rejected = batch.ref_chosen_logps, batch.ref_rejected_logps
    expected = float(jnp.mean(run.loss(chosen, rejected, chosen, rejected, **batch.fields)))
    nll = run.nll_weight * float(metrics["nll_loss"].value()) if run.nll_weight else 0.0
    passed = abs(loss - nll - expected) < 2e-2 * max(1.0, abs(expected))
    note = " = ln 2" if abs(expected - np.log(2)) < 1e-4 else ""
    said = f"policy = reference, so the loss of the first batch should be {expected:.4f}{note}: it is {loss - nll:.4f}"
    return Check(passed, said)


@named
def contrast(tokens: Tokens) -> Check:
    """The completions that are compared differ: tokens [b k t], k completions of each prompt."""
    ids, segments, mask = (np.asarray(x) for x in (tokens.ids, tokens.segments, tokens.mask))
    real = (segments > 0).any((1, 2))
    marked = np.where(mask, ids, -1)
    alike = (marked == marked[:, :1]).all((1, 2)) & real
    said = f"{alike.sum()} of {real.sum()} prompts of the first batch have completions that are token by token the same"
    if alike.sum() == real.sum():
        return Check(False, f"{said}: nothing can be learned from them")
    return Check(True, said, note=bool(alike.any()))


def labels(desirable: Any, tokens: Tokens) -> Check:
    """Completions of both kinds, for a loss that weighs good ones against bad ones (KTO)."""
    good = np.asarray(desirable)[(np.asarray(tokens.segments) > 0).any(1)]
    said = f"{good.sum()} of {len(good)} completions of the first batch are marked good"
    return Check(True, said, note=bool(good.all() or not good.any()))


def kl_controller(factor: float) -> Check:
    """How far the coefficient of the KL can follow its target at most, from the first step to the last."""
    said = f"kl_target lets the KL coefficient change by a factor of {factor:.3g} at most in the whole run"
    if factor < 1.1:
        return Check(True, f"{said}, so that it hardly follows: lower kl_horizon, the number of episodes", note=True)
    return Check(True, said)


@named
def sampler(policy: Policy, rollout: Rollout, sampling: Sampling | None = None) -> Check:
    """The sampler's log-probabilities are those that the trainer computes for the same tokens, under the same
    temperature and filters.
    """
    logps = jax.jit(functools.partial(token_logps, policy.model, sampling=sampling))
    trained = hosts.whole(logps(policy.params, rollout.tokens))
    worst = float(np.abs(trained - np.where(rollout.tokens.mask, rollout.logps, 0)).max(initial=0))
    check = _within(policy, worst, "log-probabilities of sampled tokens, by the sampler and by the trainer")
    if worst > VISIBLE:
        return check._replace(said=f"{check.said}; old_logps='trainer' keeps that out of the ratios")
    return check


@named
def sampled_tokens(rollout: Rollout, tokenizer: Any, stop_ids: tuple[int, ...], *, single_turn: bool = True) -> Check:
    """Exactly what was sampled is trained: the stop token once, nothing after it (in a single turn), no prompt; shown
    on a decoded row.
    """
    ids, segments, mask = (np.asarray(x) for x in jax.tree.leaves(rollout.tokens))
    best = int(np.argmax(np.asarray(rollout.finished)))  # a row that ended, where there is one
    shown = f"the trained tokens of a row, in ⟦ ⟧: {marked(ids[best], segments[best], mask[best], tokenizer)}"
    finished = np.asarray(rollout.finished)
    if (mask & (segments == 0)).any() or mask[:, 0].any() or not mask.any():
        return Check(False, f"padding or the first token of a row is trained, or nothing at all\n{shown}")
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    ends = np.isin(ids[np.arange(len(ids)), last], stop_ids) & mask.any(1)
    stops = np.isin(ids, stop_ids) & mask
    if (finished & ~ends).any():
        count = (finished & ~ends).sum()
        return Check(False, f"{count} completions ended, and their stop token is not trained\n{shown}")
    if single_turn and (stops[:, :-1] & mask[:, 1:]).any():
        return Check(False, f"tokens after a stop token are trained, in a single turn\n{shown}")
    note = "" if finished.any() else "; none ended by itself: max_completion may be short for this policy"
    said = (
        f"{mask.sum()} of {(segments > 0).sum()} tokens are trained; {finished.sum()} of {len(ids)} completions ended"
    )
    return Check(True, f"{said}, {ends.sum()} of them in a trained stop token{note}; {shown}")


@named
def same_policy(look: Callable[[Any, Tokens], jax.Array], params: Any, reference: Any, rollout: Rollout) -> Check:
    """The policy is still the reference, so KL is exactly 0 (at any temperature): both sides are computed by the
    trainer, with the run's own temperature and filters.
    """
    now, ref = (hosts.whole(look(p, rollout.tokens)) for p in (params, reference))
    kl, ratio = float((now - ref).sum(1).mean()), np.exp(now - ref)
    exact = bool((now == ref).all())
    worst = float(np.abs(now - ref).max())
    why = "" if exact else f": the weights of policy and reference differ (by {worst:.1e} nats at some token)"
    return Check(
        exact, f"policy = reference: KL of a first rollout {kl:g}, ratios {ratio.min():g} to {ratio.max():g}{why}"
    )


@named
def same_ratios(
    policy: Policy,
    look: Callable[[Any, Tokens], jax.Array],
    learns: Callable[[Any, Tokens], Any],
    params: Any,
    rollout: Rollout,
) -> Check:
    """What the update differentiates (with its critic, entropy, …) starts at the log-probabilities that are taken for
    the old ones, so that its first ratios are 1 to rounding.
    """
    old = hosts.whole(look(decoder_params(params), rollout.tokens))
    now = hosts.whole(jax.jit(lambda p, t: learns(p, t).logps)(params, rollout.tokens))
    return _within(policy, float(np.abs(now - old).max(initial=0)), "log-probabilities by the update and before it")


def first_surrogate(run: Any) -> Check:
    """Nothing to check; said because it looks like a mistake to everybody once."""
    centred = getattr(run, "whiten_advantages", False) or getattr(run, "group", 1) > 1
    why = "advantages have mean 0 and " if centred else ""
    return Check(
        True,
        f"loss/policy_avg will start near {'0' if centred else '−mean(advantage)'}: {why}the ratio is 1 before the "
        "first update, so the surrogate's value says nothing; its gradient (grad_norm) does",
    )


def _within(policy: Policy, worst: float, what: str) -> Check:
    dtype = policy.model.config.compute_dtype
    return Check(
        worst <= TOLERANCE[dtype], f"{what}: differ by {worst:.1e} at most (tolerance {TOLERANCE[dtype]} in {dtype})"
    )


@named
def learning_rate(schedule: optax.Schedule, steps: int) -> Check:
    """The schedule is finite, and said to end where the run does (one that goes on may be meant to)."""
    rates = np.asarray([schedule(int(step)) for step in np.unique(np.linspace(0, steps - 1, 100, dtype=int))])
    low, high, last = rates[0], rates.max(), rates[-1]
    said = f"learning rate over {steps} updates: {low:.2e} at first, {high:.2e} at most, {last:.2e} at last"
    if not np.isfinite(rates).all() or (rates < 0).any():
        return Check(False, f"{said}: it must be finite and not negative")
    end, after = np.asarray([schedule(steps), schedule(2 * steps)])
    if abs(after - end) > 1e-5 * high:
        said += f"; the schedule goes on after the run, to {after:.2e} in as many more: is it meant for a longer one?"
    return Check(rates.max() > 0, said if rates.max() > 0 else f"{said}: nothing would be learned")


def positions(config: Any, longest: int) -> list[Check]:
    """A note where rows are longer than what a rotary model was made for, and nothing stretches its rotation."""
    if config.learned_positions or longest <= config.max_positions or any(r.kind != "default" for r in config.ropes):
        return []
    return [
        Check(
            True,
            f"note: rows have up to {longest} tokens, and the model was made for {config.max_positions} "
            "(max_position_embeddings) without a scaling of its rotation: beyond them it may write and judge badly. "
            "Lower max_prompt + max_completion, or set rope_parameters in its config.json",
        )
    ]


def moving_average(decay: float, iterations: int) -> Check:
    """How much of what is evaluated and exported is still the initial policy when the run ends: decay^iterations."""
    left = decay**iterations
    said = f"evaluated and exported is an average of the weights (ema={decay}), at the end {left:.0%} initial ones"
    if left > 0.5:
        said += ": it hardly follows so short a run, --ema None takes the policy itself"
    return Check(True, said)


@named
def memory(analysis: Any) -> Check:
    """What the compiler says that the update needs, against what one device has."""
    if analysis is None:
        return Check(True, "the compiler of this device does not say how much memory the update needs")
    needed = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    room = (
        stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    )
    said = f"the update needs {needed / 2**30:.2f} GiB of the {room / 2**30:.1f} GiB of a device ({device.device_kind})"
    advice = ": use more microbatches, remat, a smaller batch, or more devices on the fsdp axis"
    return Check(needed <= room, said if needed <= room else said + advice)
