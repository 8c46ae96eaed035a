"""What the policy of an online run makes of held-out prompts, and what the rewards say of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rljax import (
    data,
    decoding,
    episodes,
    hosts,
    iteration,
    judges,
    policy,
    program,
    prompts,
    settings,
    shaping,
    tracking,
)
from rljax.errors import UserError
from rljax.iteration import Learner, exported
from rljax.program import Progress


class Written(NamedTuple):
    """Completions of some data rows, with their rewards; all on the host."""

    prompts: list[str]
    texts: list[str]  # with special tokens, but for the one that a text stopped at
    total: np.ndarray  # f32[n]
    parts: dict[str, np.ndarray]  # f32[n] each
    lengths: np.ndarray  # i64[n]; tokens
    finished: np.ndarray  # bool[n]


def write(run: Any, setup: Any, learner: Learner, rows: data.Rows, seed: int) -> Written:
    """One completion of each row's prompt, sampled as in training, and judged."""
    now = setup.start._replace(params=exported(learner))
    key = jax.random.key(np.uint32(seed))
    if run.environment is not None:
        return _episodes(run, setup, now, rows, key, seed)
    drawn = dataclasses.asdict(settings.sampling(run, ()))
    drawn = {name: value for name, value in drawn.items() if name not in ("stop_ids", "absent")}  # the policy's
    asked = [data.prompt_row(row)["prompt"] for row in rows]  # with the tools of a chat
    made = policy.complete(
        now,
        asked,
        key,
        max_new_tokens=run.max_completion,
        batch=min(run.batch * run.group, max(1, len(rows))),
        max_prompt=run.max_prompt,
        **drawn,
    )
    rollouts: Any = jax.tree.map(lambda *x: np.concatenate(x), *made.rollouts)
    source = prompts.prompts(run, now.tokenizer, rows)._replace(fields=setup.sampler.source.fields)
    part = hosts.share_of_known(len(rows))  # every process has all texts, and judges some
    said = judges.start(setup.sampler.judges, source, range(len(rows)), rollouts.tokens, part)()
    lengths, finished = np.asarray(rollouts.tokens.mask).sum(1), np.asarray(rollouts.finished)
    return Written([shown(prompt) for prompt in asked], made.raw, said.total, dict(said.parts), lengths, finished)


def shown(prompt: Any) -> str:
    """A prompt as a text to look at."""
    return prompt if isinstance(prompt, str) else "\n".join(map(_message, prompt))


def _message(message: Mapping[str, Any]) -> str:
    """One that calls tools need not have content."""
    calls = message.get("tool_calls")
    said = [message.get("content") or "", json.dumps(calls, ensure_ascii=False, default=str) if calls else ""]
    return f"{message['role']}: {' '.join(filter(None, said))}"


def _episodes(run: Any, setup: Any, now: policy.Policy, rows: data.Rows, key: Any, seed: int) -> Written:
    sampler = setup.sampler
    rollout, _, total, _ = episodes.of_rows(
        run,
        now,
        rows,
        range(len(rows)),
        key,
        seed=(seed,),
        width=sampler.source.width,
        mesh=sampler.mesh,
        poll=sampler.judges.poll,
        say=sampler.judges.say,
        said=sampler.judges.said,
    )
    tokens, width = rollout.tokens, sampler.source.width  # prompts end before this column
    real, after = np.asarray(tokens.segments) > 0, np.arange(tokens.ids.shape[1]) >= width
    prompt, rest = (dataclasses.replace(tokens, mask=real & where) for where in (~after, after))
    asked = decoding.texts(now.tokenizer, prompt)
    texts = decoding.texts(now.tokenizer, rest, special=True, stop_ids=now.stop_ids)
    lengths, finished = np.asarray(tokens.mask).sum(1), np.asarray(rollout.finished)
    return Written(asked, texts, total, {"environment": total}, lengths, finished)


def log(
    run: Any, written: Written, progress: Progress, tracker: tracking.Tracker, step: int
) -> tuple[Progress, dict[str, float] | None]:
    """Log what was written; (progress, what ranks this state), where something does: nothing if no reward applied."""
    found: dict[str, float | None] = {"reward": mean(written.total), "reward/std": spread(written.total)}
    found |= {f"rewards/{name}/mean": mean(values) for name, values in written.parts.items()}
    found["completions/mean_length"] = mean(written.lengths)
    found["completions/clipped_ratio"] = mean(~written.finished)
    found = {name: value for name, value in found.items() if value is not None}
    tracker.log(step, found, prefix="eval/")
    if "reward" not in found:
        tracker.status(f"none of the {len(written.total)} held-out prompts has a reward: nothing to measure by")
        return progress, None
    return program.rank(run, {f"eval/{name}": value for name, value in found.items()}, progress)


def show(run: Any, written: Written, tracker: tracking.Tracker, step: int, phase: str) -> None:
    """Show samples."""
    columns = zip(written.prompts, written.texts, written.total, strict=True)
    rows = [
        {"phase": phase, "prompt": p, "completion": t, "reward": None if np.isnan(r) else round(float(r), 4)}
        for p, t, r in list(columns)[: run.samples]
    ]
    tracker.samples(step, rows, title=f"step {step}" if phase == "during" else f"{phase} training")


def measure(run: Any, setup: Any, learner: Learner, tracker: tracking.Tracker, step: int, phase: str) -> None:
    """Find out what the experiment itself wants to know, before and after training."""
    now = setup.start._replace(params=exported(learner))
    program.measure(run, now, setup.start.params, tracker, step, phase)


def mean(values: np.ndarray) -> float | None:
    """Over the rows that have a value; None where there are none."""
    here = np.asarray(values, np.float64)[~np.isnan(np.asarray(values, np.float64))]
    return float(here.mean()) if len(here) else None


def spread(values: np.ndarray) -> float | None:
    here = values[~np.isnan(values)].astype(np.float64)
    return float(here.std()) if len(here) else None


def reference_moments(run: Any, setup: Any, learner: Learner, tracker: tracking.Tracker) -> Learner:
    """The learner with the moments of the scores that the policy's samples get before training (1909.08593, 2.1)."""
    source = setup.sampler.source.rows
    rows = source.select(np.arange(run.normalize_reference) % len(source))
    with tracker.phase(f"normalising the reward on {len(rows)} samples of the policy"):
        written = write(run, setup, learner, rows, run.seed + 1)
        scores = np.asarray(iteration.shortened(run, written.total, written.lengths))  # what the moments are applied to
    moments = shaping.update_moments(learner.moments, scores, ~np.isnan(scores))
    std = float(np.sqrt(moments.variance()))
    tracker.status(f"reward before normalising: mean {float(moments.mean):.3f}, std {std:.3f}")
    if not std > 0:
        raise UserError(
            f"normalize_reference={run.normalize_reference}: all samples of the policy score {float(moments.mean):g}, "
            "so there is nothing to scale by; leave it out, or take more samples"
        )
    placed = jax.device_put(moments, setup.shardings.moments)
    return dataclasses.replace(learner, moments=placed)


__all__ = ["Written", "log", "measure", "reference_moments", "show", "shown", "write"]
