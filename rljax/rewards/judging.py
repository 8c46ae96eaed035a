"""Host rewards, judged in the background: threads and an event loop that leave the device and the main thread alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.errors import UserError
from rljax.rewards.answers import LARGEST, TOO_LARGE, Answer, Wrong, parse
from rljax.rewards.core import Reward, RewardError, Scores, deciding, described
from rljax.rewards.text import prompt_text

TICK = 0.1  # seconds between two looks at whether to stop
PATIENCE = 10.0  # seconds of waiting before it is said what is waited for
ATTRIBUTION = 10.0  # seconds to find the row that makes a reward raise
STALLED = 5.0  # seconds after which an event loop that does not turn is left to what blocks it
TEXTS = ("prompts", "completions")
ON_REQUEST = ("raw_completions", "prompt_texts")  # not among **kwargs
IDS = ("prompt_ids", "completion_ids", *ON_REQUEST)


class Rows(NamedTuple):
    """The batch that rewards judge."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    fields: Mapping[str, Sequence[Any]]  # the data's, and those of IDS
    lengths: list[int]  # tokens of each completion


class Awaited(NamedTuple):
    """The coroutines of a judgement, so that they end with it."""

    tasks: list[concurrent.futures.Future[Any]]
    over: threading.Event  # the judgement was given up

    def give_up(self) -> None:
        self.over.set()
        for task in self.tasks:
            task.cancel()


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A batch that is being judged."""

    rewards: tuple[Reward, ...]
    rows: Rows
    answers: dict[str, concurrent.futures.Future[Answer]]
    awaited: Awaited
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
        Raises RewardError for the first reward that failed, or is not done in time. Async ones under way are cancelled
        then; a thread cannot be.
        """
        try:
            answers = self._wait(timeout, poll, say)
        except BaseException:
            self.awaited.give_up()
            raise
        return combine(self.rewards, answers, self.rows)

    def _wait(
        self, timeout: float | None, poll: Callable[[], None] | None, say: Callable[[str], None] | None
    ) -> dict[str, Answer]:
        begun, said = time.monotonic(), say is None
        while True:
            done, awaited = concurrent.futures.wait(
                self.answers.values(), timeout=TICK, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for answer in done:
                answer.result()
            names = [name for name, answer in self.answers.items() if answer in awaited]
            if not names:
                return {name: answer.result() for name, answer in self.answers.items()}
            if poll is not None:
                poll()
            if timeout is not None and time.monotonic() - self.started > timeout:
                raise _late(self.rows, names, timeout)
            if not said and time.monotonic() - begun > PATIENCE:
                said = True
                assert say is not None
                say(f"waiting for the reward {' and '.join(names)}")


def start(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    fields: Mapping[str, Sequence[Any]],
    prompt_ids: Sequence[np.ndarray],
    completion_ids: Sequence[np.ndarray],
    raw_completions: Sequence[str] | None = None,
    prompt_texts: Sequence[str] | None = None,
) -> Judgement:
    """Begin to judge a batch with host rewards, all of them at once, and return at once.

    prompts, completions, prompt_ids, completion_ids and every field have one entry a row; without raw_completions and
    prompt_texts (see `wants`) the completions and prompts stand in for them. Plain functions run in a
    daemon thread each; async ones share an event loop that lives as long as the program, so that an HTTP client may be
    kept between batches. Only if one of them blocks the loop for more than 5 seconds do later ones get another loop.
    """
    raw, texts = completions if raw_completions is None else raw_completions, prompt_texts
    texts = [prompt_text(prompt) for prompt in prompts] if texts is None else texts
    ids = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "raw_completions": raw, "prompt_texts": texts}
    for name, column in {"completions": completions, **ids, **fields}.items():
        if len(column) != len(prompts):
            raise UserError(f"{name} has {len(column)} entries for {len(prompts)} prompts: give one for each row")
    rows = Rows(prompts, completions, {**fields, **ids}, [len(ids) for ids in completion_ids])
    device = [one.name for one in rewards if one.on_device]
    if device:
        raise UserError(f"the reward {device[0]} is a JAX function: judge it with judge_on_device")
    awaited = Awaited([], threading.Event())
    answers = {one.name: _begin(one, rows, awaited) for one in rewards}
    return Judgement(tuple(rewards), rows, answers, awaited, time.monotonic())


def wants(rewards: Sequence[Reward], column: str) -> bool:
    """Whether one of them asks for a column that is made on request only (`ON_REQUEST`)."""
    named = (column in {p.name for p in parameters(one.fn)} - bound(one.fn) for one in rewards if not one.on_device)
    return any(named) or (column == "raw_completions" and any(one.special_tokens for one in rewards))


def combine(rewards: Sequence[Reward], answers: Mapping[str, Answer], rows: Rows) -> Scores:
    """The weighted sum of the rewards that apply to each row, in float64 until the end.

    A row is scored where a reward with a weight applies: monitors, of weight 0, do not decide that (see `deciding`).
    """
    total, applies = np.zeros(len(rows.lengths)), np.zeros(len(rows.lengths), bool)
    per_token = [np.zeros(n) for n in rows.lengths]
    for one in rewards:
        answer = answers[one.name]
        here = ~np.isnan(answer.sums)
        total += np.where(here, one.weight * np.where(here, answer.sums, 0.0).astype(np.float64), 0.0)
        for row, tokens in enumerate(answer.per_token or ()):
            per_token[row] += 0.0 if tokens is None else one.weight * tokens.astype(np.float64)
    for one in deciding(rewards):
        applies |= ~np.isnan(answers[one.name].sums)
    some = any(answer.per_token is not None for answer in answers.values())
    for row in np.flatnonzero(~(np.abs(total) <= LARGEST))[:1]:
        raise RewardError(
            f"the weighted sum of the rewards ({', '.join(one.name for one in rewards)}) in row {row} is "
            f"{total[row]:g}, {TOO_LARGE}. {_evidence(rows, int(row))}"
        )
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
    declared = parameters(fn)
    known = {*fields, *IDS, *TEXTS, *(_own_names(declared, fields) or ())}
    required = [p for p in declared if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in required if p.name not in known]


def parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those of its signature."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature: they get prompts and completions
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def _own_names(declared: Sequence[inspect.Parameter], fields: Collection[str]) -> list[str] | None:
    """What a function calls prompts and completions, which it then gets by position; None: it gets all by name.

    By position go the first two parameters (or *args) if they are called `prompts` and `completions`, or have names
    that stand for nothing else. One that is named like a column of the batch gets that column wherever it stands, as
    TRL calls rewards: nothing is swapped silently.
    """
    first = [p for p in declared if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in first if p.default is p.empty][:2]
    starred = any(p.kind == p.VAR_POSITIONAL for p in declared)
    enough = len(names) == 2 or (starred and len(names) == len(first))
    own = names == [*TEXTS] or not {*fields, *IDS, *TEXTS}.intersection(names)
    return names if own and enough else None


def _arguments(fn: Callable[..., Any], rows: Rows) -> tuple[list[Any], dict[str, Any]]:
    """What the function is called with: lists of its own, so that no reward sees another's changes to them."""
    declared = parameters(fn)
    own = _own_names(declared, rows.fields)
    texts = {"prompts": list(rows.prompts), "completions": list(rows.completions)}
    columns = {name: list(column) for name, column in rows.fields.items()} | texts
    handed = {*own, *TEXTS} if own is not None else set()
    names = {p.name for p in declared if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - set(own or ())
    if any(p.kind == p.VAR_KEYWORD for p in declared):
        names |= set(columns) - handed - set(ON_REQUEST)
    keywords = {n: column for n, column in columns.items() if n in names and n not in bound(fn)}
    if own is not None:
        return list(texts.values()), keywords
    nameless = itertools.takewhile(lambda p: p.kind == p.POSITIONAL_ONLY and p.name in columns, declared)
    return [columns[p.name] for p in nameless], keywords


def bound(fn: Any) -> set[str]:
    """Keywords that functools.partial binds: an option that was set is not overwritten by a field of that name."""
    found: set[str] = set()
    while isinstance(fn, functools.partial):
        found |= set(fn.keywords)
        fn = fn.func
    return found


def _begin(one: Reward, rows: Rows, awaited: Awaited) -> concurrent.futures.Future[Answer]:
    future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer = _ask(one, rows, awaited)
        except BaseException as error:  # it has to reach the main thread, whatever it is
            future.set_exception(error)
        else:
            future.set_result(answer)

    threading.Thread(target=work, name=f"reward {one.name}", daemon=True).start()
    return future


def _ask(one: Reward, rows: Rows, awaited: Awaited) -> Answer:
    """The reward's answer for the batch, or a RewardError that names a row."""
    check_fields([one], [name for name in rows.fields if name not in IDS])
    if one.special_tokens:
        rows = rows._replace(completions=rows.fields["raw_completions"])
    try:
        return parse(_call(one.fn, rows, awaited), rows.lengths)
    except Wrong as wrong:
        raise RewardError(_message(one.name, rows, wrong.row, wrong.what)) from None
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: they are the reward's
        row = None if awaited.over.is_set() else _culprit(one.fn, rows, type(error), awaited)
        raise RewardError(_message(one.name, rows, row, f"it raised {described(error)}")) from error


def _call(fn: Callable[..., Any], rows: Rows, awaited: Awaited) -> Any:
    """What the function returns; a coroutine's result, awaited in the shared loop while this thread waits."""
    positional, keywords = _arguments(fn, rows)
    raw = fn(*positional, **keywords)
    if not inspect.isawaitable(raw):
        return raw

    async def wait() -> tuple[Any, BaseException | None]:
        try:
            return await raw, None
        except asyncio.CancelledError:  # given up
            raise
        except BaseException as error:  # a SystemExit raised there would end the loop of all rewards
            return None, error

    task = asyncio.run_coroutine_threadsafe(wait(), _event_loop())
    awaited.tasks.append(task)
    if awaited.over.is_set():  # only now, when nobody else would cancel it
        task.cancel()
    said, error = task.result()
    if error is not None:
        raise error
    return said


def _culprit(fn: Callable[..., Any], rows: Rows, kind: type[BaseException], awaited: Awaited) -> int | None:
    """The first row that makes the reward raise this alone; None where none does, or where it takes long to find."""
    begun = time.monotonic()
    for row in range(len(rows.lengths)):
        if time.monotonic() - begun > ATTRIBUTION or awaited.over.is_set():
            return None
        column = slice(row, row + 1)
        fields = {name: values[column] for name, values in rows.fields.items()}
        alone = Rows(rows.prompts[column], rows.completions[column], fields, rows.lengths[column])
        try:
            _call(fn, alone, awaited)
        except kind:
            return row
        except BaseException:
            continue
    return None


_FIRST = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async rewards, which runs until the program ends; another one if a coroutine blocks it."""
    with _FIRST:  # several rewards may ask at the same time
        if not _turns(_started_loop()):
            _started_loop.cache_clear()
        return _started_loop()


def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop goes on: not while a coroutine sleeps or asks a server without await."""
    turned = threading.Event()
    loop.call_soon_threadsafe(turned.set)
    return turned.wait(STALLED)


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_turn, args=(loop,), name="async rewards", daemon=True).start()
    return loop


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop for ever, also where a task in it (one of several in a gather) wants to end the program."""
    while True:
        with contextlib.suppress(BaseException):  # the task's own future has it as well
            loop.run_forever()


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
