"""The rewards of a run at work: host rewards in the background, JAX rewards on the devices, one verdict of both."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rljax import decoding, hosts, rewards
from rljax.prompts import Prompts
from rljax.rewards.answers import TOO_LARGE
from rljax.types import Tokens

PATIENCE = 3  # batches without a row to which a reward applies before that is said
SUM = "(all of them, weighted)"


class Leaving(Exception):
    """A signal came while the run waited for rewards."""


class Judges(NamedTuple):
    """All that it takes to judge a batch."""

    host: tuple[rewards.Reward, ...]
    device: tuple[rewards.Reward, ...]
    on_device: Callable[[Any, Tokens], Any]  # jitted `judge_on_device` of the device's rewards
    tokenizer: Any
    mesh: Mesh
    timeout: float | None  # seconds
    poll: Callable[[], None]  # raises to stop waiting
    say: Callable[[str], None]
    stop_ids: tuple[int, ...]
    said: set[str]  # what need not be said again
    batches: collections.Counter[str]  # in which a reward applied to some row, or to none


def make(
    asked: Sequence[rewards.Reward],
    *,
    tokenizer: Any,
    mesh: Mesh,
    timeout: float | None,
    stop: Any,
    say: Callable[[str], None],
    stop_ids: tuple[int, ...] = (),
) -> Judges:
    """stop: what `tracking.graceful_stop` gives: once it is requested, nobody waits any longer."""
    device = tuple(one for one in asked if one.on_device)

    def poll() -> None:
        if stop.requested is not None and jax.process_count() == 1:  # of several processes none may leave alone
            raise Leaving

    return Judges(
        host=tuple(one for one in asked if not one.on_device),
        device=device,
        on_device=jax.jit(lambda params, tokens: rewards.judge_on_device(device, params, tokens)),
        tokenizer=tokenizer,
        mesh=mesh,
        timeout=timeout,
        poll=poll,
        say=say,
        stop_ids=stop_ids,
        said=set(),
        batches=collections.Counter(),
    )


def start(
    judges: Judges, source: Prompts, indices: Sequence[int] | np.ndarray, tokens: Tokens, part: hosts.Share
) -> Callable[[], rewards.Scores]:
    """Set all rewards to work on completions, and return what waits for them: scores of the rows that are here.

    part: which rows are here, and which of them this process judges. indices: the data row of each row that is here.
    tokens: of a batch, global arrays; or in numpy, those that all processes have.
    RewardError from the second for a reward that fails, that is not done in time, or that gives a NaN; of several
    processes all raise it, as a `hosts.AgreedError`.
    """
    said = judges.on_device(rewards.device_params(judges.device), tokens) if judges.device else None
    here: Tokens = hosts.local(tokens, judges.mesh)
    mine = np.searchsorted(part.here, part.mine)
    own = jax.tree.map(lambda x: np.asarray(x)[mine], here)
    host = _start_host(judges, source, np.asarray(indices)[mine], own) if judges.host and len(mine) else None

    def answer() -> rewards.Scores:
        if host is None:
            return _no_scores(judges, len(mine))
        return host.result(timeout=judges.timeout, poll=judges.poll, say=judges.say)

    def wait() -> rewards.Scores:
        mask = np.asarray(here.mask)
        scores = _no_scores(judges, len(mask))
        if judges.host:
            scores = _of_all(part, hosts.together(answer), own.mask, mask)
            if said is None:
                _say_of_nothing(judges, scores)
        if said is None:
            return scores
        known = isinstance(tokens.ids, np.ndarray)
        total, per_token, parts = hosts.whole(said) if known else hosts.local(said, judges.mesh)
        both = rewards.merge(scores, total, per_token, parts, mask, (*judges.host, *judges.device))
        some = np.where(np.isnan(both.total), 0.0, both.total)  # to the others no reward applies
        hosts.together(lambda: refuse_nan(with_sum(parts, some), here, judges.tokenizer))
        return both

    return wait


def _no_scores(judges: Judges, rows: int) -> rewards.Scores:
    nothing = np.full(rows, np.nan, np.float32)
    return rewards.Scores(nothing, None, {one.name: nothing for one in judges.host})


def _of_all(part: hosts.Share, scores: rewards.Scores, judged: np.ndarray, mask: np.ndarray) -> rewards.Scores:
    """Scores of the rows that this process judges (masks `judged`) -> of all its rows (masks `mask`)."""
    if part.apart:
        return scores
    total, parts = hosts.exchange(part, (scores.total, scores.parts))
    (some,) = hosts.most(scores.per_token is not None)
    if not some:
        return rewards.Scores(total, None, parts)
    dense = hosts.exchange(part, on_tokens(scores.per_token, judged))
    return rewards.Scores(total, [row[where] for row, where in zip(dense, mask, strict=True)], parts)


def on_tokens(per_token: Sequence[np.ndarray] | None, mask: np.ndarray) -> np.ndarray:
    """f32[b t]: rewards of single tokens where their tokens stand, 0 elsewhere and where there are none."""
    found = np.zeros(mask.shape, np.float32)
    for i, said in enumerate(per_token or ()):
        found[i, mask[i]] = said
    return found


def _start_host(
    judges: Judges, source: Prompts, indices: Sequence[int] | np.ndarray, tokens: Tokens
) -> rewards.Judgement:
    some = [source.rows[int(i)] for i in indices]
    ids = [source.ids(int(i)) for i in indices]
    written = [row for _, row in decoding.rows(tokens)]
    _say_of_specials(judges, written)
    more: dict[str, list[str]] = {}
    if rewards.wants(judges.host, "raw_completions"):
        more["raw_completions"] = decoding.texts(judges.tokenizer, tokens, special=True, stop_ids=judges.stop_ids)
    if rewards.wants(judges.host, "prompt_texts"):
        more["prompt_texts"] = [decoding.decode(judges.tokenizer, prompt, special=True) for prompt in ids]
    return rewards.start(
        judges.host,
        [row["prompt"] for row in some],
        decoding.texts(judges.tokenizer, tokens),
        fields={name: [row.get(name) for row in some] for name in source.fields},
        prompt_ids=ids,
        completion_ids=written,
        **more,
    )


def _say_of_specials(judges: Judges, written: Sequence[np.ndarray]) -> None:
    """Say once that rewards do not see a special token that the policy writes, and what to do."""
    blind = [one.name for one in judges.host if not (one.special_tokens or rewards.wants([one], "raw_completions"))]
    if not blind or "special tokens" in judges.said:
        return
    found = dict.fromkeys(
        name for ids in written for name in decoding.specials(judges.tokenizer, ids, stop_ids=judges.stop_ids)
    )
    if found:
        judges.said.add("special tokens")
        judges.say(
            f"completions hold the special tokens {', '.join(list(found)[:5])}, which texts are without: the "
            f"reward{'s' * (len(blind) > 1)} {', '.join(blind)} cannot see them. If they matter, make it "
            f"rewards.reward({blind[0]}, special_tokens=True)"
        )


def _say_of_nothing(judges: Judges, scores: rewards.Scores) -> None:
    """Say once that a reward applies to no row of the first batches: nothing is learned from it."""
    judges.batches.update(["all"])
    for name, values in {"all": scores.total, **scores.parts}.items():
        if len(values) and np.isnan(values).all():
            judges.batches.update([f"none of {name}"])
        else:
            judges.batches[f"some of {name}"] += 1
        empty, some = judges.batches[f"none of {name}"], judges.batches[f"some of {name}"]
        if some or name in judges.said or empty < (1 if name == "all" else PATIENCE):
            continue
        judges.said.add(name)
        if name == "all":
            judges.say(f"no reward applies to any of {len(values)} completions (all said None): they train nothing")
        else:
            judges.say(f"the reward {name} said None of every completion of {empty} batches: it applies to none")


def with_sum(parts: Mapping[str, np.ndarray], total: np.ndarray) -> dict[str, np.ndarray]:
    """What JAX rewards gave, with their weighted sum, which may be too large where none of them is."""
    return {**parts, SUM: total}


def refuse_nan(parts: Mapping[str, np.ndarray], tokens: Tokens, tokenizer: Any, when: str = "") -> None:
    """RewardError where a JAX reward gave something that is not a number to learn from. All on the host."""
    for name, values in parts.items():
        for row in np.flatnonzero(~rewards.sound(np.asarray(values)))[:1]:
            large = f", {TOO_LARGE}" if np.isfinite(values[row]) else ""
            ids, mask = np.asarray(tokens.ids)[row], np.asarray(tokens.mask)[row]
            before = (np.asarray(tokens.segments)[row] > 0) & (np.cumsum(mask) == 0)
            raise rewards.RewardError(
                f"the reward {name} failed in row {row}{when}: it returned {values[row]}{large}. Row {row}: prompt "
                f"{decoding.decode(tokenizer, ids[before], special=True)!r}, completion "
                f"{decoding.continuation(tokenizer, ids[before], ids[mask], special=True)!r}"
            )
