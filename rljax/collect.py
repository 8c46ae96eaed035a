"""Rollouts with their verdicts: prompts in, what the policy writes, what host rewards say; and those that have to wait.

The `n`-th batch of prompts and all random numbers spent on it are functions of (seed, n), so the only state is how many
were drawn, and the queue: judged groups that were not trained on yet. There is a queue where rewards may lag behind the
policy (`lag`), and where groups without contrast are filtered out (`filter_groups`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rljax import episodes, hosts, judges, policy, rewards, sharding
from rljax.iteration import Greedy, Trace, Verdict, greedy_verdict
from rljax.judges import Judges
from rljax.prompts import Prompts, prompt_tokens
from rljax.types import Params, Rollout, Tokens
from rljax.views import decoder_params


class Round(NamedTuple):
    """One batch of rollouts, on its way."""

    rollout: Rollout  # global arrays, on the devices
    judge: Callable[[], Callable[[], Verdict]]  # sets the rewards to work; what it returns waits for them


class Experience(NamedTuple):
    """Judged rollouts on the host, all of them on every process; rows stand in groups."""

    rollout: Rollout
    verdict: Verdict
    born: np.ndarray  # i32[b]: the iteration whose policy wrote the row; −1 for a row that is not there


def verdict_of(scores: rewards.Scores, mask: np.ndarray) -> Verdict:
    """Scores of rows, on the host, with per-token rewards (0 where there are none) put where their tokens stand."""
    per_token = judges.on_tokens(scores.per_token, mask)
    arrays: dict[str, Any] = {"total": scores.total, "parts": dict(scores.parts), "per_token": per_token}
    return Verdict(**arrays)


class Sampler(NamedTuple):
    """All that it takes to collect; made once by the program."""

    run: Any
    mesh: Mesh
    start: policy.Policy  # model, tokenizer and stop ids; its weights are not used
    judges: Judges
    source: Prompts
    sample: Callable[[Params, Tokens, jax.Array], Rollout]  # compiled
    greedy: Callable[[Params, Tokens], Rollout] | None  # compiled
    queue: Experience | None  # an empty queue, where the run has one


def begin(sampler: Sampler, params: Params, number: int) -> Round:
    """Sample the batch of prompts `number`, and set its judges to work."""
    if sampler.run.environment is not None:
        return _begin_episodes(sampler, params, number)
    run, source, mesh = sampler.run, sampler.source, sampler.mesh
    indices, part = source.batch(number), hosts.share(run.batch, mesh)
    asked = place_prompts(sampler, number)
    key = jax.random.fold_in(jax.random.key(run.seed), number)
    rollout = sampler.sample(params, asked, key)
    greedy = None if sampler.greedy is None else sampler.greedy(params, asked)

    def start() -> Callable[[], Verdict]:
        each = np.repeat(indices, run.group), rollout.tokens, hosts.grouped(part, run.group)
        judging = judges.start(sampler.judges, source, *each)
        alone = None if greedy is None else judges.start(sampler.judges, source, indices, greedy.tokens, part)
        return functools.partial(wait, judging, alone)

    def wait(judging: Callable[[], rewards.Scores], alone: Callable[[], rewards.Scores] | None) -> Verdict:
        said = verdict_of(judging(), hosts.local(rollout.tokens.mask, mesh))
        if alone is not None:
            said = dataclasses.replace(said, greedy=greedy_verdict(alone().total, hosts.local(greedy, mesh), run.group))
        return hosts.place(said, mesh)

    return Round(rollout, start)


def place_prompts(sampler: Sampler, number: int) -> Tokens:
    """The batch of prompts `number` on the devices."""
    return hosts.place(prompt_tokens(sampler.source, sampler.source.batch(number)), sampler.mesh)


def _begin_episodes(sampler: Sampler, params: Params, number: int) -> Round:
    """Episodes of an environment: what it says comes with them. An AgreedError if all of them failed."""
    run, source = sampler.run, sampler.source
    now = sampler.start._replace(params=decoder_params(params))
    key = jax.random.fold_in(jax.random.key(run.seed), number)
    played = episodes.of_rows(
        run,
        now,
        source.rows,
        source.batch(number),
        key,
        seed=(run.seed, number),
        width=source.width,
        mesh=sampler.mesh,
        poll=sampler.judges.poll,
        say=sampler.judges.say,
        said=sampler.judges.said,
        n=run.group,
    )
    if played.failure is not None:
        raise hosts.AgreedError(played.failure)
    total = played.total
    arrays: dict[str, Any] = {"total": total, "parts": {"environment": total}, "per_token": played.rewards}
    rollout, verdict = hosts.spread((played.rollout, Verdict(**arrays)), sampler.mesh)
    return Round(rollout, lambda: lambda: verdict)


# --- the queue --------------------------------------------------------------------------------------------------------


def collect(
    sampler: Sampler, params: Params, queue: Experience | None, draws: int, step: int
) -> tuple[Experience, Callable[[], Experience | None], int]:
    """(a batch to train on, what is left in the queue, batches of prompts drawn): through the queue, oldest first.

    The second is a function: with `lag`, rewards of rollouts for later iterations are awaited by it, after the update.
    """
    run = sampler.run
    need, rows = run.batch * run.group, queue
    rows = None if rows is None else take(rows, (rows.born >= 0) & (step - rows.born <= (run.max_age or run.lag)))
    for _ in range(run.max_rounds):
        if rows is not None and len(rows.born) >= need:
            break
        a_round = begin(sampler, params, draws)
        found = _judged(run, a_round.rollout, a_round.judge()(), step)
        rows, draws = found if rows is None else join(rows, found), draws + 1
    if rows is None or len(rows.born) < need:
        have = 0 if rows is None else len(rows.born) // run.group
        raise hosts.AgreedError(
            f"after max_rounds={run.max_rounds} rounds of sampling only {have} of {need // run.group} groups have "
            "different rewards within the group: choose prompts that are neither always nor never solved, a larger "
            "group, or more max_rounds"
        )
    later = [begin(sampler, params, draws + i) for i in range(run.lag - (len(rows.born) - need) // need)]
    waiting = [(a_round.rollout, a_round.judge()) for a_round in later]  # the judges work while the update runs
    now, left = take(rows, slice(need)), take(rows, slice(need, None))

    def rest() -> Experience | None:
        found = (_judged(run, rollout, wait(), step) for rollout, wait in waiting)
        return functools.reduce(join, found, left) if run.max_age or run.lag else None

    return now, rest, draws + len(later)


def _judged(run: Any, rollout: Rollout, verdict: Verdict, step: int) -> Experience:
    """A round on the host, without the groups that are filtered out."""
    rollout, verdict = hosts.whole((rollout, verdict))
    found = Experience(rollout, verdict, np.full(len(verdict.total), step, np.int32))
    if not run.filter_groups:
        return found
    groups = verdict.total.reshape(-1, run.group)
    high, low = (np.where(np.isnan(groups), x, groups) for x in (-np.inf, np.inf))
    return take(found, np.repeat(high.max(1) > low.min(1), run.group))


def take(rows: Experience, which: Any) -> Experience:
    return jax.tree.map(lambda x: x[which], rows)


def join(a: Experience, b: Experience) -> Experience:
    return jax.tree.map(lambda *x: np.concatenate(x), a, b)


def queued(run: Any) -> bool:
    """Whether rollouts go through a queue."""
    return bool(run.lag or run.filter_groups)


def empty_queue(rollout: Rollout, parts: Sequence[str], greedy: bool, rows: int) -> Experience:
    """A queue of `rows` rows that are not there. rollout: abstract, of one round."""
    nothing = {name: np.zeros(rows, np.float32) for name in ("total", *parts)}
    tokens = jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), rollout)
    arrays: dict[str, Any] = {"total": nothing.pop("total"), "parts": nothing, "per_token": np.zeros_like(tokens.logps)}
    arrays["greedy"] = _greedy_of(functools.partial(np.zeros, rows)) if greedy else None
    return Experience(tokens, Verdict(**arrays), np.full(rows, -1, np.int32))


def _greedy_of(row: Callable[[Any], Any]) -> Greedy:
    """row: dtype -> one array of that many rows."""
    return Greedy(total=row(np.float32), lengths=row(np.int32), finished=row(np.bool_))


def padded(queue: Experience | None, empty: Experience) -> Experience:
    """The queue in a fixed shape, for a checkpoint; what does not fit is dropped."""
    return empty if queue is None else take(join(queue, empty), slice(len(empty.born)))


# --- shapes and checks ------------------------------------------------------------------------------------------------


def abstract_prompts(run: Any, width: int, mesh: Mesh) -> Tokens:
    """The shapes of a batch of prompts, for the compiler."""
    ids = jax.ShapeDtypeStruct((run.batch, width), np.int32)
    arrays: dict[str, Any] = {"ids": ids, "segments": ids, "mask": jax.ShapeDtypeStruct(ids.shape, bool)}
    return placed(Tokens(**arrays), mesh)


def abstract_verdict(rollout: Rollout, parts: Sequence[str], greedy: bool, mesh: Mesh) -> Verdict:
    of = functools.partial(jax.ShapeDtypeStruct, rollout.finished.shape)
    arrays: dict[str, Any] = {"total": of(np.float32), "parts": dict.fromkeys(parts, of(np.float32))}
    arrays["greedy"] = _greedy_of(of) if greedy else None
    return placed(Verdict(per_token=jax.ShapeDtypeStruct(rollout.logps.shape, np.float32), **arrays), mesh)  # pyright: ignore


def placed(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays with the shardings of a batch."""
    shardings = sharding.batch_shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def check_on_device(sampler: Sampler, trace: Trace) -> None:
    """RewardError where a JAX reward gave this iteration a NaN (which then has learned nothing)."""
    if sampler.judges.device and not sampler.judges.host and sampler.queue is None:
        parts = judges.with_sum(*hosts.whole((trace.verdict.parts, trace.verdict.total)))
        if not all(rewards.sound(values).all() for values in parts.values()):
            tokens = hosts.whole(trace.rollout.tokens)
            hosts.together(lambda: judges.refuse_nan(parts, tokens, sampler.start.tokenizer))
