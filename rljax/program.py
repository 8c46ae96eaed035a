"""What every program shares: the settings of a run and how they become a mesh, a policy, an optimizer and a folder."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rljax import data, hosts, models, notes, policy, ranges, selfchecks, sharding, traces, tracking, train
from rljax.errors import UserError
from rljax.identity import contents, describe
from rljax.manifest import read_json, record_contents, write_json
from rljax.metrics import best_mode
from rljax.models import hf
from rljax.ranges import Count, Natural, Positive, Rate, Seed
from rljax.types import Mean, TrainState

State = TypeVar("State")  # a pytree of arrays
PATIENCE = 60.0  # seconds in which all processes are done with an experiment's own `evaluate` if one fails in it
TOKEN_BYTES = 32  # of host memory for each token of a batch: ids, segments, masks, log-probabilities, and a copy
ADAM = functools.partial(optax.adamw, weight_decay=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of any run. Fields only: programs are functions that take one. Each is an option: `--steps 100`."""

    model: str  # a folder, or a name that resolves to one: smollm2-135m-instruct
    data: str | Callable[..., Any]  # pairs.jsonl, x.parquet, tfds:NAME, hf:OWNER/NAME, or a function of the policy
    eval_data: str | None = None  # held-out rows; None sets some of `data` aside
    eval_split: str | None = None  # of eval_data, or of `data` where that is None; None: "train"
    eval_rows: Count = 64  # how many are set aside (at most a tenth of the data), by their prompts
    split: str = "train"  # which part of a tfds: or hf: data set is trained on
    split_seed: Seed = 0  # of which prompts are set aside
    max_prompt: Count = 256  # tokens; longer prompts lose their beginning
    max_completion: Count = 256  # tokens; longer completions lose their end
    overlong: data.Overlong = "cut"  # what is longer is cut as above, left out ("drop") or an error ("refuse")
    stop: tuple[str, ...] = ()  # texts of one token that end a completion, beside those of the checkpoint and template

    steps: Count = 200  # updates from a data set, iterations (sample, judge, learn) from the policy
    batch: Count = 8  # rows (pairs, comparisons) per update, over all devices
    microbatches: Count = 1  # pieces of a batch whose gradients are added up one after the other, to save memory
    learning_rate: Rate = 1e-6  # at the peak of the schedule
    schedule: Callable[..., optax.Schedule] = train.linear  # (peak, updates) -> optax schedule; warmup is in updates
    optimizer: Callable[..., optax.GradientTransformation] = ADAM  # takes learning_rate=, the schedule
    clip_norm: Positive | None = 1.0  # of the gradient over all parameters; None: unclipped
    on_nan: train.OnNan = "stop"  # at a loss, gradient or weight that is not finite; skip: leave that update out
    seed: Seed = 0  # of the order of the data, of sampling, of new heads

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters; moments and averages are float32
    compute_dtype: Literal["float32", "bfloat16"] | None = None  # of products; None: bfloat16 on accelerators
    remat: Literal["none", "dots", "full"] = "dots"  # what the backward pass computes again instead of keeping
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # splash: TPU; cudnn: NVIDIA; see docs/scaling.md
    unroll: Count | None = None  # layers per step of the scan; None: all of up to 8, else (and with remat "full") one
    offload_reference: bool = False  # initial weights wait in host memory and come to the device a layer at a time
    mesh: Callable[..., Mesh] = sharding.make_mesh  # devices along data, fsdp, tensor, context

    name: str | None = None  # the run's folder; None: the file's name
    out: str = "runs"  # the folder of all runs
    eval_every: Count = 50  # steps between evaluations of held-out rows
    save_every: Count = 50  # steps between checkpoints
    keep: Count = 2  # the latest checkpoints that stay, beside the best
    accept_changes: str = ""  # fields a,b,c (or all) that a resumed run may find changed: see docs/resuming.md
    best: str | None = None  # a held-out metric; the checkpoint where it was best is kept
    best_mode: Literal["min", "max"] | None = None  # which way `best` gets better; None: as its name says (loss: min)
    patience: Natural | None = None  # stop after this many evaluations without a better `best`; 0: as 1
    samples: Natural = 4  # held-out prompts whose continuations are shown
    sample_tokens: Count = 64  # the length of those continuations, in offline runs
    # (policy, reference params, key) -> Evaluation, before and after training
    evaluate: Callable[..., Any] | None = None
    checks: bool = True  # before the first step; --no-checks leaves out all
    waive: str = ""  # checks a,b,c by name whose failure is said and does not stop the run: sampler, trained_tokens, …
    profile: Natural = 0  # steps to trace once the run has settled, for TensorBoard's Profile tab
    wandb: bool = False  # log to Weights & Biases too


class Evaluation(NamedTuple):
    """What an experiment's own `evaluate` function found out."""

    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()  # rows for the sample table


def check_settings(run: Run) -> None:
    """Raise UserError for settings that cannot work, before anything is loaded."""
    _check_class(run)
    if hasattr(run.optimizer, "init"):
        raise UserError(
            "optimizer is a function of the learning rate, such as optax.adamw or "
            "functools.partial(optax.adamw, b2=0.95), not what it makes: the run gives it its schedule"
        )
    ranges.check(run)
    if not _answered(run) and run.batch % run.microbatches:
        raise UserError(f"batch={run.batch} cannot be cut into microbatches={run.microbatches} equal parts")
    best_mode(run.best, run.best_mode)
    if run.patience is not None and run.best is None:
        raise UserError("patience needs to know what should get better: set best to a held-out metric, eval/loss say")
    if run.profile and run.steps <= traces.SETTLED:
        raise UserError(
            f"profile={run.profile} traces steps after the first {traces.SETTLED}, in which a run settles, and there "
            f"are only steps={run.steps}: take more"
        )
    for field in dataclasses.fields(run):
        if field.name != "reward":  # the data's fields fill a reward's keywords
            _check_filled(field.name, getattr(run, field.name))
    selfchecks.waived(run.waive)
    _check_optimizer(run, updates(run))


def updates(run: Run) -> int:
    """How many updates the whole run makes: one a step offline, those of all epochs and minibatches online."""
    return run.steps * run.epochs * run.minibatches if _answered(run) else run.steps  # pyright: ignore


def _check_optimizer(run: Run, updates: int) -> None:
    """Raise UserError for a schedule or an optimizer that does not make what an update needs."""
    try:
        schedule = run.schedule(run.learning_rate, updates)
        rates = [float(np.asarray(schedule(step))) for step in (0, updates // 2, updates - 1)]
    except TypeError as error:
        raise UserError(
            "schedule is a function (peak, steps) -> optax schedule, such as rljax.train.cosine or "
            f"functools.partial(rljax.train.linear, warmup=10), not {run.schedule!r}: {error}"
        ) from error
    if not all(np.isfinite(rate) and rate >= 0 for rate in rates):
        raise UserError(f"the schedule gives the learning rates {rates} (first, middle, last update): not all are ≥ 0")
    try:
        made = run.optimizer(learning_rate=schedule)
    except TypeError as error:
        raise UserError(
            f"optimizer has to take learning_rate=: {error}; a functools.partial may bind the rest"
        ) from error
    if not (hasattr(made, "init") and hasattr(made, "update")):
        raise UserError(f"optimizer must make an optax.GradientTransformation, {run.optimizer!r} made {made!r}")


def _check_class(run: Run) -> None:
    """Raise UserError for a class of the user's whose fields nothing would see."""
    cls, fields = type(run), {field.name for field in dataclasses.fields(run)}
    own = [name for name in dict.fromkeys((*inspect.get_annotations(cls), *vars(cls))) if not name.startswith("_")]
    lost = [name for name in own if name in fields or name in inspect.get_annotations(cls)]
    if lost and "__dataclass_params__" not in vars(cls):
        raise UserError(
            f"{cls.__name__} sets {', '.join(lost)} and is no dataclass, so that the values of "
            f"{cls.__bases__[0].__name__} would be used: write "
            "@dataclasses.dataclass(frozen=True, kw_only=True) above it"
        )


def _check_filled(name: str, function: Any) -> None:
    """Raise UserError for a function with keywords that nothing fills."""
    try:
        parameters = inspect.signature(function).parameters.values() if callable(function) else ()
    except (TypeError, ValueError):  # some builtins have no signature
        return
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if missing:
        called = getattr(function, "__name__", "the function")
        options = " ".join(f"--{name}.{key.replace('_', '-')} …" for key in missing)
        keywords = ", ".join(f"{key}=…" for key in missing)
        raise UserError(
            f"{name}={called} needs {', '.join(missing)}: say {options}, "
            f"or {name}=functools.partial({called}, {keywords})"
        )


def _check_room(run: Run) -> None:
    """Raise UserError for a batch whose token numbers alone do not fit into this machine: it would be killed."""
    rows = run.batch * getattr(run, "group", 1) // jax.process_count()
    needed = rows * (run.max_prompt + run.max_completion) * TOKEN_BYTES
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{rows} rows of max_prompt + max_completion = {run.max_prompt + run.max_completion} tokens need about "
            f"{needed / 2**30:,.0f} GiB for their numbers alone, and this machine has {there / 2**30:,.0f} GiB: lower "
            f"batch={run.batch} or the lengths (`rljax plan FILE` says what a run needs of its devices)"
        )


def make_mesh(run: Run, devices: Sequence[Any] | None = None) -> Mesh:
    """The run's mesh, checked against its batch. devices: others than those here, to compile for them."""
    if devices is None:
        _check_room(run)
    mesh = run.mesh() if devices is None else run.mesh(devices=devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = shards if _answered(run) else shards * run.microbatches
    if run.batch % parts:
        raise UserError(
            f"batch={run.batch} in microbatches={run.microbatches} cannot be spread over data×fsdp={shards} devices: "
            f"make it a multiple of {parts}, or set --mesh.data, --mesh.fsdp, --mesh.tensor"
        )
    return hosts.connected(mesh) if devices is None else mesh


def _answered(run: Run) -> bool:
    """Whether the batch is one of prompts, so that its microbatches are of other rows: those of their answers."""
    return hasattr(run, "group")


def load_policy(run: Run, mesh: Mesh) -> policy.Policy:
    """The run's checkpoint on its mesh (in the memory of its hosts, if it waits there), in its dtypes."""
    check_positions(run, hf.config(run.model))
    loaded = policy.stopping(policy.load(run.model, mesh=mesh, dtype=jnp.dtype(run.dtype)), run.stop)
    if run.offload_reference:
        loaded = loaded._replace(params=sharding.in_host_memory(loaded.params))
    return loaded._replace(model=models.build(configured(run, loaded.model.config, mesh)))


def longest_row(run: Run) -> int:
    """Tokens that a row of the run may have. Prompts of an environment are cut to a multiple of `policy.BUCKET`."""
    step = 1 if getattr(run, "environment", None) is None else policy.BUCKET
    return -(-run.max_prompt // step) * step + run.max_completion


def check_positions(run: Run, config: models.ModelConfig) -> None:
    """UserError where a model that learned a vector for each position has fewer than a row or a sample needs."""
    longest, plain = longest_row(run), run.max_prompt + run.max_completion
    rounded = (
        "" if longest == plain else f" (an environment's max_prompt is rounded up to {longest - run.max_completion})"
    )
    asked = {"max_prompt + max_completion": longest}
    if run.samples and not _answered(run):
        asked["max_prompt + sample_tokens"] = run.max_prompt + run.sample_tokens
    for name, tokens in asked.items():
        if config.learned_positions and tokens > config.max_positions:
            raise UserError(
                f"{name} = {tokens} tokens{rounded}, but {run.model} has {config.max_positions} positions: lower them"
            )


def configured(run: Run, config: models.ModelConfig, mesh: Mesh) -> models.ModelConfig:
    """A model's config as this run computes it on this mesh. UserError where it has no room for the run's rows."""
    check_positions(run, config)
    switches = any(rope.kind == "longrope" for rope in config.ropes)
    accelerated = mesh.devices.flat[0].platform != "cpu"
    return dataclasses.replace(
        config,
        compute_dtype=run.compute_dtype or ("bfloat16" if accelerated else "float32"),
        attention=run.attention,
        remat=run.remat,
        unroll=run.unroll,
        longest_row=longest_row(run) if switches else None,
    )


def make_optimizer(run: Run, updates: int | None = None) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The run's optimizer, with gradient clipping before it, and the schedule inside it.

    updates: how many the whole run makes; None: one a step.
    """
    schedule = run.schedule(run.learning_rate, run.steps if updates is None else updates)
    clip = [optax.clip_by_global_norm(run.clip_norm)] if run.clip_norm is not None else []
    return optax.chain(*clip, run.optimizer(learning_rate=schedule)), schedule


def learning_rate(schedule: optax.Schedule, state: TrainState) -> Mean:
    """That of the last update: the optimizer's own count, which an update without a trained token leaves as it is."""
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    made = counts[-1][1] if counts else state.step
    return Mean(total=jnp.asarray(schedule(jnp.maximum(made - 1, 0))), weight=jnp.ones(()))


def place_state(state: State, rules: Any, mesh: Mesh) -> tuple[State, State]:
    """(state on its shardings, those shardings): parameters by the rules, optimizer moments as their parameters."""
    shardings = sharding.shardings(jax.eval_shape(lambda: state), rules, mesh)
    return jax.device_put(state, shardings), shardings


Split = tuple[data.Rows, data.Rows]  # to train on, held out


def read_rows(run: Run, start: policy.Policy, folder: pathlib.Path, tracker: tracking.Tracker) -> Split:
    """(rows to train on, rows held out). What a function makes is kept in the run's folder, for a resumed run."""
    if callable(run.data):
        kept = folder / "data" / "train.jsonl"
        recipe = {name: describe(getattr(run, name)) for name in ("data", "model", "seed")}
        note = folder / "data" / "recipe.json"
        if hosts.told(np.asarray(read_json(note) != recipe)):  # one process decides, all may be needed to make them
            with tracker.phase("making the data"):
                made = run.data(start, jax.random.key(run.seed))
                hosts.together(lambda: data.write_jsonl(kept, made) if jax.process_index() == 0 else None)
                if jax.process_index() == 0:
                    write_json(note, recipe)
                    record_contents(folder, "data", contents.rows(str(kept)))
        rows = data.read(kept)
    else:
        rows = data.read(run.data, split=run.split)
    parts, lines = split_rows(run, rows)
    notes.keep(folder, "split", lines, tracker.status)
    return parts


def eval_source(run: Run) -> tuple[Any, str] | None:
    """(source, split) of the held-out rows; None where they are set aside."""
    if run.eval_data is None and run.eval_split is None:
        return None
    if run.eval_data is None and callable(run.data):
        raise UserError(f"eval_split={run.eval_split!r} names a split of eval_data, and data is a function: give both")
    return (run.data if run.eval_data is None else run.eval_data), run.eval_split or "train"


def split_rows(run: Run, rows: data.Rows) -> tuple[Split, list[str]]:
    """(rows to train on, rows held out), and what is to be said of that."""
    source = eval_source(run)
    if source is not None:
        if not callable(run.data) and source == (run.data, run.split):
            raise UserError(
                f"eval_data={run.eval_data!r} with the split {run.split!r} is what is trained on: name another split "
                "with eval_split, or leave eval_data out, and some of the data is set aside"
            )
        held = data.read(source[0], split=source[1])
        if len(held) == len(rows) and held[0] == rows[0] and data.fingerprint(held) == data.fingerprint(rows):
            raise UserError(f"eval_data={run.eval_data!r} holds the very rows that are trained on: give others")
        shared = data.shared_prompts(rows, held)
        names = ", ".join(held.where(i) for i in shared[:3]) + (", …" if len(shared) > 3 else "")
        said = [f"{len(shared)} of {len(held)} held-out rows have a prompt that is trained on too ({names})"]
        unused = f"eval_rows={run.eval_rows} is for rows set aside: all {len(held)} of {source[0]} are held out"
        return (rows, held), said[: len(shared)] + ([unused] if run.eval_rows != Run.eval_rows else [])
    if len(rows) == 1:
        return (rows, rows), ["the data has one row: it is also what is evaluated on"]
    count = max(1, min(run.eval_rows, len(rows) // 10))
    parts = data.split_prompts(rows, count=count, seed=run.split_seed)
    if parts is None:
        line = f"all {len(rows)} rows have the same prompt: {count} are held out by row, and share it with training"
        return data.split(rows, count=count, seed=run.split_seed), [line]
    return parts, []


class Progress(NamedTuple):
    """What a checkpoint remembers beside the state."""

    best: float | None = None
    waited: int = 0  # evaluations since it was found
    done: bool = False
    draws: int = 0  # batches of prompts drawn so far (online)
    owed: Mapping[str, float | None] | None = None  # this step's record, where its evaluation is still to come
    left_out: int = 0  # steps in a row, up to this one, without an update (on_nan="skip")


def resumed(run: Run, step: int, kept: Mapping[str, Any]) -> Progress:
    """The progress that a checkpoint of this step remembers (`kept`, which may hold more). A run that has been given
    more steps goes on.
    """
    progress = Progress(**{name: value for name, value in kept.items() if name in Progress._fields})
    return progress._replace(done=progress.done and (step >= run.steps or patient(run, progress)))


def rank(run: Run, found: Mapping[str, float | None], progress: Progress) -> tuple[Progress, dict[str, float] | None]:
    """(progress, what ranks this state) after an evaluation that found these metrics; None where nothing ranks."""
    if run.best is None:
        return progress, None
    if run.best in found and found[run.best] is None:  # not finite: nothing is better by it
        return progress._replace(waited=progress.waited + 1), None
    value = found.get(run.best)
    if value is None:
        raise UserError(f"best={run.best!r} is not a number of this evaluation: choose one of {sorted(found)}")
    sign = 1 if best_mode(run.best, run.best_mode) == "max" else -1
    if progress.best is None or sign * value > sign * progress.best:
        return progress._replace(best=value, waited=0), {run.best: value}
    return progress._replace(waited=progress.waited + 1), {run.best: value}


def _finite(value: Any) -> bool:
    try:
        return bool(np.isfinite(float(value.value() if isinstance(value, Mean) else value)))
    except (TypeError, ValueError):
        return False


def patient(run: Run, progress: Progress) -> bool:
    """Whether the run has waited long enough for a better `best`; it has not where that was found just now."""
    return run.patience is not None and progress.waited >= max(1, run.patience)


def measure(run: Run, now: policy.Policy, reference: Any, tracker: tracking.Tracker, step: int, phase: str) -> None:
    """What the experiment itself wants to know, before and after training."""
    evaluate = run.evaluate
    if evaluate is None:
        return
    with tracker.phase(f"measuring {phase} training"):
        asked = functools.partial(evaluate, now, sharding.in_device_memory(reference), jax.random.key(run.seed))
        found = hosts.together(asked, patience=PATIENCE)
    if not isinstance(getattr(found, "metrics", None), Mapping):
        raise UserError(f"evaluate must return an Evaluation(metrics={{name: number}}, samples=…), not {found!r:.200}")
    odd = {name: value for name, value in found.metrics.items() if not _finite(value)}
    if odd and phase == "before":
        raise UserError(f"evaluate gives metrics that are no finite numbers: {odd!r:.200}")
    if odd:  # what was trained is kept
        tracker.status(f"evaluate gives metrics that are no finite numbers: {odd!r:.200}")
    tracker.log(step, {k: v for k, v in found.metrics.items() if k not in odd}, prefix="eval/")
    tracker.samples(step, [{"phase": phase, **row} for row in found.samples], title=f"{phase} training")


def run_folder(run: Run, file: str | pathlib.Path | None) -> pathlib.Path:
    """Where a run writes. UserError for a name that leads out of `out`, by itself or over a link."""
    default = pathlib.Path(file).stem if file else type(run).__name__.lower()
    out, name = pathlib.Path(run.out), default if run.name is None else run.name
    parts = pathlib.PurePath(name).parts
    if not parts or pathlib.PurePath(name).is_absolute() or ".." in parts or not name.isprintable():
        raise UserError(
            f"name={name!r} must be the name of a folder in {out}, such as {default!r}; `out` says where that is"
        )
    folder = out / name
    if not folder.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"{folder} is a link to {folder.resolve()}, outside of {out}: give --out {folder.resolve().parent} "
            f"--name {folder.resolve().name}, or another name"
        )
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(
                f"{place} is a file, and a run's folder would have to be there: give another --out or --name"
            )
    return folder
