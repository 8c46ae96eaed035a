"""Host rewards, judged in the background: threads and an event loop that leave the device and the main thread alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.rewards.answers import Answer, Wrong, parse
from rljax.rewards.core import Reward, RewardError, Scores

TICK = 0.1  # seconds between two looks at whether to stop
PATIENCE = 10.0  # seconds of waiting before it is said what is waited for
ATTRIBUTION = 10.0  # seconds to find the row that makes a reward raise
IDS = ("prompt_ids", "completion_ids")


class Rows(NamedTuple):
    """The batch that rewards judge."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    fields: Mapping[str, Sequence[Any]]  # the data's, and prompt_ids and completion_ids
    lengths: list[int]  # tokens of each completion


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A batch that is being judged."""

    rewards: tuple[Reward, ...]
    rows: Rows
    answers: dict[str, concurrent.futures.Future[Answer]]
    started: float

    def result(
        self,
        *,
        timeout: float | None,
        poll: Callable[[], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Scores:
        """Wait for all rewards: what they say, weighted and apart.

        timeout: seconds that a reward may take since it was started; None waits for ever. poll: called about ten times
        a second while waiting; it raises to stop. say: is told which rewards are awaited, once, after 10 seconds.
        Raises RewardError for the first reward that failed, or is not done in time.
        """
        begun, said = time.monotonic(), say is None
        while True:
            done, awaited = concurrent.futures.wait(
                self.answers.values(), timeout=TICK, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for answer in done:
                answer.result()
            names = [name for name, answer in self.answers.items() if answer in awaited]
            if not names:
                break
            if poll is not None:
                poll()
            if timeout is not None and time.monotonic() - self.started > timeout:
                raise _late(self.rows, names, timeout)
            if not said and time.monotonic() - begun > PATIENCE:
                said = True
                assert say is not None
                say(f"waiting for the reward {' and '.join(names)}")
        return combine(self.rewards, {name: answer.result() for name, answer in self.answers.items()}, self.rows)


def start(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    fields: Mapping[str, Sequence[Any]],
    prompt_ids: Sequence[np.ndarray],
    completion_ids: Sequence[np.ndarray],
) -> Judgement:
    """Begin to judge a batch with host rewards, all of them at once, and return at once.

    prompts, completions, prompt_ids, completion_ids and every field have one entry a row. Plain functions run in a
    daemon thread each; async ones share an event loop that lives as long as the program, so that an HTTP client may be
    kept between batches.
    """
    ids = {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
    for name, column in {"completions": completions, **ids, **fields}.items():
        if len(column) != len(prompts):
            raise ValueError(f"{name} has {len(column)} entries for {len(prompts)} prompts: give one for each row")
    rows = Rows(prompts, completions, {**fields, **ids}, [len(ids) for ids in completion_ids])
    device = [one.name for one in rewards if one.on_device]
    if device:
        raise ValueError(f"the reward {device[0]} is a JAX function: judge it with judge_on_device")
    return Judgement(tuple(rewards), rows, {one.name: _begin(one, rows) for one in rewards}, time.monotonic())


def combine(rewards: Sequence[Reward], answers: Mapping[str, Answer], rows: Rows) -> Scores:
    """The weighted sum of the rewards that apply to each row, in float64 until the end."""
    total, applies = np.zeros(len(rows.lengths)), np.zeros(len(rows.lengths), bool)
    per_token = [np.zeros(n) for n in rows.lengths]
    for one in rewards:
        answer = answers[one.name]
        here = ~np.isnan(answer.sums)
        total += np.where(here, one.weight * np.where(here, answer.sums, 0.0).astype(np.float64), 0.0)
        applies |= here
        for row, tokens in enumerate(answer.per_token or ()):
            per_token[row] += 0.0 if tokens is None else one.weight * tokens.astype(np.float64)
    some = any(answer.per_token is not None for answer in answers.values())
    return Scores(
        np.where(applies, total, np.nan).astype(np.float32),
        [tokens.astype(np.float32) for tokens in per_token] if some else None,
        {one.name: answers[one.name].sums for one in rewards},
    )


# --- calling ----------------------------------------------------------------------------------------------------------


def check_fields(rewards: Sequence[Reward], fields: Sequence[str]) -> None:
    """Raise RewardError for a host reward that needs a field which the data does not have: before the first batch.

    fields: the names of the data's fields, without "prompt".
    """
    for one in rewards:
        lacking = [] if one.on_device else _missing(one.fn, fields)
        if lacking:
            raise RewardError(
                f"the reward {one.name} needs the field {' and the field '.join(lacking)}, which the data does not "
                f"have (its fields: {', '.join(fields) or 'none but the prompt'}): add it to the data, give it that "
                "name there, or bind it with functools.partial"
            )


def _missing(fn: Callable[..., Any], fields: Sequence[str]) -> list[str]:
    """The parameters without default that nothing would be handed to."""
    parameters = _parameters(fn)
    by_position, _ = _by_position(parameters)
    known = {*fields, *IDS, "prompts", "completions", *by_position}
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in required if p.name not in known]


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature: they get prompts and completions
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def _by_position(parameters: Sequence[inspect.Parameter]) -> tuple[list[str], bool]:
    """(names of the parameters that get prompts and completions by position, whether they go by position at all).

    By position is the rule. A function that names `completions` first, or has no second positional parameter, gets
    `prompts` and `completions` by name, as TRL calls rewards: nothing is swapped silently.
    """
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return names, True
    if len(names) == 2 and names[0] != "completions":
        return names, True
    return [], False


def _arguments(fn: Callable[..., Any], rows: Rows) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the function is called with: lists of its own, so that no reward sees another's changes to them."""
    parameters = _parameters(fn)
    taken, positional = _by_position(parameters)
    texts = {"prompts": list(rows.prompts), "completions": list(rows.completions)}
    available = {name: list(column) for name, column in rows.fields.items()}
    if not positional:
        available = {**available, **texts}
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - set(taken)
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        names |= set(available) - set(taken) - set(texts if positional else ())
    keywords = {n: column for n, column in available.items() if n in names and n not in _bound(fn)}
    return tuple(texts.values()) if positional else (), keywords


def _bound(fn: Any) -> set[str]:
    """Keywords that functools.partial binds: an option that was set is not overwritten by a field of that name."""
    found: set[str] = set()
    while isinstance(fn, functools.partial):
        found |= set(fn.keywords)
        fn = fn.func
    return found


def _begin(one: Reward, rows: Rows) -> concurrent.futures.Future[Answer]:
    future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer = _ask(one, rows)
        except BaseException as error:  # it has to reach the main thread, whatever it is
            future.set_exception(error)
        else:
            future.set_result(answer)

    threading.Thread(target=work, name=f"reward {one.name}", daemon=True).start()
    return future


def _ask(one: Reward, rows: Rows) -> Answer:
    """The reward's answer for the batch, or a RewardError that names a row."""
    check_fields([one], [name for name in rows.fields if name not in IDS])
    try:
        return parse(_call(one.fn, rows), rows.lengths)
    except Wrong as wrong:
        raise RewardError(_message(one.name, rows, wrong.row, wrong.what)) from None
    except (Exception, SystemExit) as error:
        what = f"it raised {type(error).__name__}: {error}"
        raise RewardError(_message(one.name, rows, _culprit(one.fn, rows, type(error)), what)) from error


def _call(fn: Callable[..., Any], rows: Rows) -> Any:
    """What the function returns; a coroutine's result, awaited in the shared loop while this thread waits."""
    positional, keywords = _arguments(fn, rows)
    raw = fn(*positional, **keywords)
    if not inspect.isawaitable(raw):
        return raw

    async def wait() -> Any:
        return await raw

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop()).result()


def _culprit(fn: Callable[..., Any], rows: Rows, kind: type[BaseException]) -> int | None:
    """The first row that makes the reward raise this alone; None where none does, or where it takes long to find."""
    begun = time.monotonic()
    for row in range(len(rows.lengths)):
        if time.monotonic() - begun > ATTRIBUTION:
            return None
        column = slice(row, row + 1)
        fields = {name: values[column] for name, values in rows.fields.items()}
        alone = Rows(rows.prompts[column], rows.completions[column], fields, rows.lengths[column])
        try:
            _call(fn, alone)
        except kind:
            return row
        except (Exception, SystemExit):
            continue
    return None


_FIRST = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async rewards, which runs until the program ends."""
    with _FIRST:  # several rewards may ask at the same time
        return _started_loop()


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


# --- messages ---------------------------------------------------------------------------------------------------------


def _message(name: str, rows: Rows, row: int | None, what: str) -> str:
    where = "" if row is None else f" in row {row}"
    return f"the reward {name} failed{where}: {what}. {_evidence(rows, row)}"


def _late(rows: Rows, names: Sequence[str], timeout: float) -> RewardError:
    who = f"the reward {names[0]} is" if len(names) == 1 else f"the rewards {' and '.join(names)} are"
    return RewardError(
        f"{who} not done with {len(rows.lengths)} rows after {timeout:g} seconds: mend it if it hangs, or allow it "
        f"more time. {_evidence(rows, None)}"
    )


def _evidence(rows: Rows, row: int | None) -> str:
    if not rows.lengths:
        return "The batch has no rows"
    first = f"Row {row or 0}" if row is not None else "The first of its rows, row 0"
    prompt, completion = rows.prompts[row or 0], rows.completions[row or 0]
    return f"{first}: prompt {_short(prompt, end=True)}, completion {_short(completion)}"


def _short(value: Any, *, limit: int = 200, end: bool = False) -> str:
    text = repr(value)
    if len(text) <= limit:
        return text
    return f"…{text[-limit:]}" if end else f"{text[:limit]}…"
