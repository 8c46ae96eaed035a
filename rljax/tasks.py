"""What the offline program trains on: rows and a policy to a `Task`, one function per kind of experiment."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax import data, models, objectives, ops
from rljax.data.chat import begins_otherwise
from rljax.data.rows import shown
from rljax.errors import UserError
from rljax.policy import Policy
from rljax.reference import View
from rljax.types import LanguageModel, LossFn, Params, PreferenceBatch, Tokens, UnpairedBatch

SIDES = ("chosen", "rejected")
FIRST = 1000  # rows that are looked at for a field


class Task(NamedTuple):
    """Data and objective, with nothing left of where they came from."""

    params: Params  # where training starts
    loss_fn: LossFn
    batch: data.Batches  # step -> the batch
    evals: Callable[..., Iterator[Any]]  # every held-out batch, the same every time; of places i64[k] of each, if given
    prepare: Callable[[Params, Any], Any] | None  # on devices: fills in what depends on the current parameters
    tokens: Callable[[Any], Tokens]  # the token rows [n t] of a batch, to look at
    prompts: Sequence[Any]  # of held-out rows, to sample from
    notes: tuple[str, ...] = ()  # what a user must know of the rows


class Split(NamedTuple):
    """One split: how many rows, and how a batch is made of some of them."""

    n: int
    make: Callable[[np.ndarray], Any]  # indices i64[local batch], -1 for none -> batch


Rows = tuple[data.Rows, data.Rows]  # to train on, held out


def part_of(task: Task, here: np.ndarray) -> Task:
    """The task of a process that reads only these places of every batch."""
    batch = dataclasses.replace(task.batch, here=here)
    return task._replace(batch=batch, evals=functools.partial(task.evals, here))


def preference(run: Any, policy: Policy, rows: Rows, view: View) -> Task:
    """Pairs of completions, with the reference's log-probabilities where the loss wants them."""
    tried = tried_rows(run, policy, rows, data.preference_row, _limited(data.preference_example, run, policy))
    named = filled_fields(run.loss, 4 if run.reference else 2, tried.train.rows)

    def split(survey: data.Survey) -> Split:
        part, pairs, length = survey.rows, survey.get, run.max_prompt + run.max_completion
        columns = {name: _column(part, name, default) for name, default in named.items()}

        def collate(indices: np.ndarray) -> tuple[Tokens, Tokens]:
            return data.collate_preference([pairs(i) for i in indices], length, prompt=run.max_prompt)

        cached = run.reference and run.cache_reference
        refs = view.cached_logps(part, collate, average=run.average) if cached else np.zeros((2, len(part)), np.float32)

        def make(indices: np.ndarray) -> PreferenceBatch:
            chosen, rejected = collate(indices)
            ref_chosen, ref_rejected = refs[:, indices]
            return _batch(
                PreferenceBatch,
                chosen=chosen,
                rejected=rejected,
                ref_chosen_logps=ref_chosen,
                ref_rejected_logps=ref_rejected,
                fields={name: np.where(indices < 0, 0, column[indices]) for name, column in columns.items()},
            )

        return Split(len(part), make)

    def fresh_reference(params: Params, batch: PreferenceBatch) -> PreferenceBatch:
        del params  # the reference has its own
        chosen, rejected = view.logps(batch.chosen, batch.rejected, average=run.average)
        return dataclasses.replace(batch, ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    return Task(
        params=policy.params,
        loss_fn=preference_loss(run, policy.model),
        prepare=fresh_reference if run.reference and not run.cache_reference else None,
        tokens=lambda batch: jax.tree.map(lambda *x: np.concatenate(x), batch.chosen, batch.rejected),
        prompts=_prompts(tried.held_out.rows, data.preference_row, run.samples),
        **_batches(run, tried, split),
    )


def preference_loss(run: Any, model: LanguageModel) -> LossFn:
    return objectives.preference(
        model,
        run.loss,
        average=run.average,
        reference=run.reference,
        nll_weight=run.nll_weight,
        nll_average=run.nll_average,
        max_trained=run.max_completion,
        share_prompts=run.share_prompts,
    )


def unpaired(run: Any, policy: Policy, rows: Rows, view: View) -> Task:
    """Completions with a label. The KL point is estimated on every batch from mismatched pairs, before the update."""
    rows = tuple(data.unpair(part) if "chosen" in part[0] else part for part in rows)  # pyright: ignore
    tried = tried_rows(run, policy, rows, data.unpaired_row, _limited(data.unpaired_example, run, policy))

    def split(survey: data.Survey) -> Split:
        part, items = survey.rows, survey.get
        n, length = len(part), run.max_prompt + run.max_completion

        def mismatched(index: int) -> data.Example:
            """A prompt with the completion of the next row that answers another prompt (the next row, if none does)."""
            mine = items(index).example
            others = (items((index + k) % n).example for k in range(1, min(n, 100)))
            same = mine.ids[: mine.prompt].tolist()
            other = next((x for x in others if x.ids[: x.prompt].tolist() != same), items((index + 1) % n).example)
            return data.mismatch(mine, other)

        def collate(indices: np.ndarray) -> tuple[Tokens, Tokens]:
            mine = [None if i < 0 else items(i).example for i in indices]
            return data.pad(mine, length), data.pad([None if i < 0 else mismatched(int(i)) for i in indices], length)

        refs = view.cached_logps(part, collate)

        def make(indices: np.ndarray) -> tuple[UnpairedBatch, Tokens, np.ndarray]:
            tokens, pairs = collate(indices)
            own, other = refs[:, indices]
            desirable = np.asarray([i >= 0 and items(i).desirable for i in indices])
            return _batch(UnpairedBatch, tokens=tokens, desirable=desirable, ref_logps=own, kl=own * 0), pairs, other

        return Split(n, make)

    return Task(
        params=policy.params,
        loss_fn=unpaired_loss(run, policy.model),
        prepare=kl_estimate(policy.model, run.max_completion),
        tokens=lambda made: made[0].tokens,
        prompts=_prompts(tried.held_out.rows, data.unpaired_row, run.samples),
        **_batches(run, tried, split),
    )


def unpaired_loss(run: Any, model: LanguageModel) -> LossFn:
    return objectives.unpaired(model, run.loss, max_trained=run.max_completion)


def kl_estimate(model: LanguageModel, max_trained: int) -> Callable[[Params, Any], UnpairedBatch]:
    """(params, (batch, mismatched pairs, their reference log-probabilities)) -> batch with its KL point (KTO)."""

    @jax.jit
    def estimate(params: Params, made: tuple[UnpairedBatch, Tokens, jax.Array]) -> UnpairedBatch:
        batch, pairs, ref_logps = made
        logps = objectives.sequence_logps(model, params, pairs, max_trained=max_trained)
        kl = ops.masked_mean(logps - ref_logps, objectives.real_rows(pairs)).value()
        return dataclasses.replace(batch, kl=jnp.broadcast_to(kl, batch.kl.shape))

    return estimate


def reward(run: Any, policy: Policy, rows: Rows, key: jax.Array) -> Task:
    """Comparisons, for a decoder with a scalar head on its last token."""
    tried = tried_rows(run, policy, rows, data.comparison_row, _limited(data.comparison_example, run, policy))
    k, length = len(data.comparison_row(rows[0][0])["completions"]), run.max_prompt + run.max_completion

    def split(survey: data.Survey) -> Split:
        items = survey.get
        return Split(len(survey.rows), lambda indices: data.collate_comparison([items(i) for i in indices], length, k))

    head = models.scalar_head(policy.model.config.hidden_size).init(key)
    return Task(
        params={"model": policy.params, "head": head},
        loss_fn=reward_loss(run, policy.model),
        prepare=None,
        tokens=lambda batch: jax.tree.map(lambda x: np.asarray(x).reshape(-1, length), batch.tokens),
        prompts=_prompts(tried.train.rows, data.comparison_row, run.normalize),
        **_batches(run, tried, split),
    )


def reward_loss(run: Any, model: LanguageModel) -> LossFn:
    return objectives.comparison(models.reward_model(model), run.loss)


def supervised(run: Any, policy: Policy, rows: Rows) -> Task:
    """Texts, chats, or prompts with completions, whichever the first row is; packed several to a row if asked for."""
    length = run.max_prompt + run.max_completion
    first = rows[0][0]
    if "messages" in first or "text" in first:
        form, make = (data.chat_row, data.chat_example) if "messages" in first else (data.text_row, data.text_example)
        example, max_trained = functools.partial(make, tokenizer=policy.tokenizer, max_length=length), None
    else:
        form, max_trained = data.completion_row, None if run.packing else run.max_completion
        example = _limited(data.completion_example, run, policy)
    tried = tried_rows(run, policy, rows, form, example)

    def split(survey: data.Survey) -> Split:
        part, items = survey.rows, survey.get
        if run.packing:
            packed = data.pack([items(i) for i in range(len(part))], length)
            return Split(
                len(packed), lambda indices: data.pad([packed[i] if i >= 0 else None for i in indices], length)
            )
        return Split(len(part), lambda indices: data.collate_supervised([items(i) for i in indices], length))

    return Task(
        params=policy.params,
        loss_fn=supervised_loss(policy.model, max_trained),
        prepare=None,
        tokens=lambda batch: batch,
        prompts=_prompts(tried.held_out.rows, form, run.samples),
        **_batches(run, tried, split),
    )


def supervised_loss(model: LanguageModel, max_trained: int | None = None) -> LossFn:
    return objectives.supervised(model, max_trained=max_trained)


class Tried(NamedTuple):
    train: data.Survey
    held_out: data.Survey


def tried_rows(
    run: Any,
    policy: Policy,
    rows: Rows,
    form: Callable[[data.Row], Any],
    example: Callable[[data.Row], Any],
) -> Tried:
    """Every mistake in the data now, not in the middle of the run, and all that is to be said of it."""
    config = policy.model.config
    told: dict[str, Any] = {"overlong": run.overlong, "tokenizer": policy.tokenizer, "positions": config.max_positions}
    found = []
    for name, part in zip(("training", "held-out"), rows, strict=True):
        data.check(part, form)
        found.append(data.survey(part, example, name=name, **told))
    found[0].lines.extend(template_note(policy, rows[0][0]))
    return Tried(*found)


def template_note(policy: Policy, row: data.Row) -> list[str]:
    """That a chat template lets generation begin otherwise than what it trains, where rows are messages."""
    chats = any(isinstance(row.get(field), list) for field in ("messages", "prompt", "chosen", "completion"))
    rest = begins_otherwise(policy.tokenizer) if chats else None
    if rest is None:
        return []
    return [
        f"the chat template's generation prompts end in {rest!r}, and the answers that it trains do not begin so: what "
        "is sampled in a chat begins otherwise than what is trained"
    ]


def filled_fields(loss: Callable[..., Any], arrays: int, rows: data.Rows) -> dict[str, Any]:
    """Keywords of a loss behind its first arrays that are fields of the rows, with their defaults: it gets what the
    data says of them.
    """
    parameters = list(inspect.signature(loss).parameters.values())
    bound = loss.keywords if isinstance(loss, functools.partial) else {}
    named = [p for p in parameters[arrays:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = {p.name: p.default for p in named if p.name not in bound and p.name not in ("prompt", *SIDES)}
    seen = {name for row in itertools.islice(rows, FIRST) for name in wanted if row.get(name) is not None}
    return {name: default for name, default in wanted.items() if name in seen}


def _column(rows: data.Rows, name: str, default: Any) -> np.ndarray:
    """f32[n]: a field of all rows, numbers, with `default` where a row has none. UserError for anything else."""

    def number(row: data.Row) -> float:
        value = default if row.get(name) is None else row[name]
        if not isinstance(value, int | float | np.number | np.bool_) or not abs(value) < 3e38:
            raise UserError(f"field {name!r}, which the loss takes, must be a finite number, not {shown(value)}")
        return float(value)

    return np.asarray([rows.apply(number, i) for i in range(len(rows))], np.float32)


def _limited(example: Callable[..., Any], run: Any, policy: Policy) -> Callable[[data.Row], Any]:
    limits = {"max_prompt": run.max_prompt, "max_completion": run.max_completion}
    return functools.partial(example, tokenizer=policy.tokenizer, **limits)


def _batch(kind: Callable[..., Any], **arrays: Any) -> Any:
    """A batch of numpy arrays (the types speak of jax arrays, which these become on the devices)."""
    return kind(**arrays)


def _batches(run: Any, tried: Tried, split: Callable[[data.Survey], Split]) -> dict[str, Any]:
    train, held_out = map(split, tried)

    def evals(here: np.ndarray | None = None) -> Iterator[Any]:
        return (held_out.make(indices) for indices in data.eval_batches(held_out.n, run.batch, here))

    said = (*tried.train.lines, *tried.held_out.lines)
    return {"batch": data.Batches(train.make, train.n, run.batch, run.seed), "evals": evals, "notes": said}


def _prompts(rows: data.Rows, form: Callable[[data.Row], dict[str, Any]], count: int) -> list[Any]:
    """What held-out rows begin with: their prompt, a chat up to the last answer, or a text's first eight words."""
    prompts = []
    for i in range(min(count, len(rows))):
        row = rows.apply(form, i)
        if "messages" in row:
            messages = row["messages"]
            last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
            if last:  # else the assistant speaks first: there is nothing to continue
                prompts.append(data.Messages(messages[:last], messages.variables))
        elif "text" in row:
            prompts.append(" ".join(row["text"].split()[:8]))
        else:
            prompts.append(row["prompt"])
    return prompts
