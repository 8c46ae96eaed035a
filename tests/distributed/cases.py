"""The experiments that are run by one process and by two: tiny, real, and each with what it is there for."""

import functools
import itertools
import pathlib

import jax

from rljax import data, losses, models, offline, online, policy, presets, rewards, train
from rljax.checkpoint import Checkpoints
from rljax.environments import Environment, Turn
from rljax.manifest import write_json

WORDS = ["cat", "dog", "tree", "house", "ball", "bird", "car", "hat", "fish", "boat"]
NAMES = ["Tom", "Lily", "Ben", "Ann"]

COMMON = {
    "steps": 4,
    "batch": 8,
    "max_prompt": 32,
    "max_completion": 16,
    "learning_rate": 1e-3,
    "eval_every": 2,
    "save_every": 2,
    "samples": 2,
    "sample_tokens": 4,
    "remat": "none",
    "schedule": train.constant,
}
ONLINE = {
    "max_completion": 6,
    "learning_rate": 1e-4,  # Adam makes a step of its own of a gradient that is rounding: a token may fall otherwise
    "eval_rows": 4,
    "evidence": 2,
}


def pairs(folder) -> str:
    rows = [
        {
            "prompt": f"Once there was a {thing}. {name} saw the {thing}.",
            "chosen": f" {name} was very happy.",
            "rejected": f" {name} was sad.",
        }
        for thing in WORDS
        for name in NAMES
    ]
    return str(data.write_jsonl(folder / "pairs.jsonl", rows))


def texts(folder) -> str:
    rows = [{"text": f"{a} and {b} went to the sea."} for a in NAMES for b in WORDS]
    return str(data.write_jsonl(folder / "texts.jsonl", rows))


def prompts(folder) -> str:
    rows = [{"prompt": f"Once there was a {a}. The {b}", "word": a} for a in WORDS for b in WORDS[:4]]
    return str(data.write_jsonl(folder / "prompts.jsonl", rows))


def judge(model, folder) -> str:
    """A run of a reward model, as `offline.RewardModel` leaves it; its scores are about a tenth."""
    run, start = pathlib.Path(folder) / "judge", policy.load(str(model))
    if not run.exists():
        head = models.scalar_head(start.model.config.hidden_size).init(jax.random.key(1))
        params = {"model": start.params, "head": {**head, "bias": jax.numpy.asarray(0.1)}}
        settings = {"kind": "RewardModel", "model": str(model), "dtype": "float32", "best": None, "best_mode": "max"}
        run.mkdir(parents=True)
        write_json(run / "experiment.json", settings)
        with Checkpoints(run / "checkpoints") as saved:
            saved.save(1, {"params": params}, {})
    return str(run)


def vowels(prompts, completions, word):
    """A host reward that also reads a field of the data."""
    return [
        sum(letter in "aeiou" for letter in text) / 10 - 0.1 * len(name)
        for text, name in zip(completions, word, strict=True)
    ]


def letters(prompts, completions):
    """Different for almost all texts, so that most groups have a contrast."""
    return [sum(map(ord, text)) % 11 / 10 for text in completions]


def moody(mark: pathlib.Path):
    """`vowels`, which raises on the second process at its third call (the second iteration), once."""
    calls = itertools.count(1)

    def ill(prompts, completions, word):
        if next(calls) == 3 and jax.process_index() == 1 and not mark.exists():
            mark.touch()
            raise KeyError("the judge is ill")
        return vowels(prompts, completions, word)

    return ill


def ill_at_3(peak, steps):
    """A schedule that raises on the second process when the third step is logged."""

    def at(count):
        logged = not isinstance(count, jax.core.Tracer)  # outside the compiled update
        if logged and int(count) == 3 and jax.process_index() == 1:
            raise RuntimeError("the schedule is ill")
        return peak

    return at


def _riddle(row, seed):
    """The seed is heard, so that episodes of other seeds are others."""
    return (seed, 0), f"{row['prompt']} {'abcdefgh'[seed % 8]}"


def _answer(state, text, ids):
    seed, turn = state
    reward = sum(map(ord, text)) % 11 / 10 + seed % 3
    return (seed, turn + 1), Turn(f" {seed % 7}?", reward=reward, done=turn == 1)


riddles = Environment(_riddle, _answer, max_turns=2)


@rewards.on_device
def short(tokens):
    return -tokens.mask.sum(1) / 6


DPO = functools.partial(losses.dpo_loss, beta=0.1)


def sft_rows(policy, key):
    """Made by the policy's processes together, written by the first: what it writes itself, and a moral."""
    from rljax.policy import complete

    asked = [f"The {a} and the {b}" for a in WORDS for b in WORDS[:3]]
    written = complete(policy, asked, key, max_new_tokens=4, batch=8).texts
    return [{"prompt": p, "completion": t + " The end."} for p, t in zip(asked, written, strict=True)]


def experiment(name: str, model: str, folder):
    """An experiment by its name; `folder` is for its data."""
    common = {"model": model, "name": name, **COMMON}
    pair, prompt, judged = f"{folder}/pairs.jsonl", f"{folder}/prompts.jsonl", f"{folder}/judge"
    on = common | ONLINE | {"data": prompt}
    device_judge = rewards.from_checkpoint(judged)
    host_judge = rewards.from_checkpoint(judged, max_length=40, name="host")  # rows are cut to it on the host
    made = {
        "sft": lambda: offline.SFT(**common, data=sft_rows),
        "packed": lambda: offline.SFT(**common, data=f"{folder}/texts.jsonl", packing=True),
        "reward": lambda: offline.RewardModel(**common, data=pair, normalize=8),
        "dpo": lambda: offline.Preference(**common, data=pair, loss=DPO, best="eval/loss", best_mode="min"),
        "dpo_fresh": lambda: offline.Preference(
            **common, data=pair, loss=DPO, cache_reference=False, microbatches=2
        ),
        "kto": lambda: offline.Unpaired(**common, data=pair),
        "ppo": lambda: online.PPO(
            **on | {"batch": 8}, reward=(vowels, host_judge, device_judge), critic=judged, epochs=2,
            minibatches=2, kl_target=2.0, kl_horizon=50, normalize_running=True, ema=0.9, old_logps="trainer",
        ),
        "grpo_device": lambda: presets.grpo(
            **on | {"group": 2}, reward=(short, device_judge)
        ),
        "online_dpo": lambda: presets.online_dpo(**on | {"group": 2}, reward=vowels),
        "raft": lambda: presets.raft(**on | {"group": 2}, reward=vowels),
        "both": lambda: presets.remax(**on, reward=(short, vowels)),
        "dapo": lambda: presets.dapo(**on | {"group": 2, "max_age": 2, "overlong_buffer": 4}, reward=letters),
        "episodes": lambda: online.PPO(
            **on | {"max_completion": 24, "group": 2, "eval_rows": 1}, environment=riddles,
            turn_tokens=4, critic="shared",
        ),
        "moody": lambda: presets.grpo(
            **on | {"group": 2, "save_every": 10}, reward=moody(pathlib.Path(folder) / "was_ill")
        ),
        "long": lambda: offline.SFT(
            **common | {"steps": 25, "save_every": 100, "eval_every": 10, "checks": False}, data=f"{folder}/texts.jsonl"
        ),
        "ill_at_3": lambda: offline.SFT(
            **common | {"schedule": ill_at_3, "checks": False, "samples": 0}, data=f"{folder}/texts.jsonl"
        ),
    }  # fmt: skip
    return made[name]()


FILE = """
from tests.distributed import cases

experiment = cases.experiment({name!r}, {model!r}, {folder!r})
"""
