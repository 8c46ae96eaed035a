"""What a value is: two that differ have other descriptions, two that are the same have one, and secrets are in none."""

import dataclasses
import functools
import importlib.util
import json
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import environments, losses, offline, rewards
from rljax.identity import describe, masking

COUNTER = iter(range(10_000))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def of_file(folder, text, name="thing"):
    """What a file's `thing` is, imported from a folder of its own."""
    folder = folder / str(next(COUNTER))
    folder.mkdir()
    path = folder / "experiment.py"
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiment"] = module
    spec.loader.exec_module(module)
    return describe(getattr(module, name))


PLAIN = """
import numpy as np
SCALE, TABLE = 0.5, {"a": 1, "b": 2}

def half(x):
    return x * SCALE

class Judge:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, prompts, completions):
        return [self.weight * half(len(text)) for text in completions]

def thing(chosen, rejected, *, beta: float = 2.0):
    '''Doc.'''
    judge = Judge(TABLE["a"])
    return np.log(half(chosen) - rejected) * beta + judge.weight
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rejected) * beta", "rejected) / beta"),
        ("beta: float = 2.0", "beta: float = 2.5"),
        ("SCALE, TABLE = 0.5", "SCALE, TABLE = 0.25"),
        ("return x * SCALE", "return x + SCALE"),
        ('"a": 1', '"a": 3'),
        ("self.weight * half", "self.weight + half"),
        ("import numpy as np", "import jax.numpy as np"),
        ("np.log(", "np.exp("),
    ],
)
def test_what_a_function_computes_is_part_of_it(tmp_path, old, new):
    assert old in PLAIN
    assert of_file(tmp_path, PLAIN) != of_file(tmp_path, PLAIN.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'''Doc.'''", "'''Another.'''\n    # and a comment"),
        ("    '''Doc.'''\n", ""),
        ("beta: float = 2.0", "beta=2.0"),
        ("return x * SCALE", "return (\n        x\n        * SCALE  # half\n    )"),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}'),
        ("def half", "\n\nUNUSED = 3\n\ndef half"),
    ],
)
def test_comments_formatting_places_and_orders_are_not(tmp_path, old, new):
    assert old in PLAIN
    assert of_file(tmp_path, PLAIN) == of_file(tmp_path, PLAIN.replace(old, new))


@pytest.mark.parametrize(
    "pair",
    [
        ("lambda p, c: [1] * len(c)", "lambda p, c: [2] * len(c)"),
        ("(lambda x: x, lambda x: x + 1)[0]", "(lambda x: x, lambda x: x + 1)[1]"),
        ("functools.partial(min, 1)", "functools.partial(min, 2)"),
        ("functools.partial(print, 1, 2)", "functools.partial(print, 12)"),
        ("functools.partial(sorted, key=len)", "functools.partial(sorted, key=str)"),
        ("(lambda k: lambda x: x + k)(1)", "(lambda k: lambda x: x + k)(2)"),
        ("(lambda k: lambda x, *, y=k: x + y)(1)", "(lambda k: lambda x, *, y=k: x + y)(2)"),
        ("(lambda k: lambda x, y=k: x + y)([1])", "(lambda k: lambda x, y=k: x + y)([2])"),
        ("(lambda f: lambda x: f(x))(lambda y: y)", "(lambda f: lambda x: f(x))(lambda y: -y)"),
        ("random.Random(1).choice", "random.Random(2).choice"),
        ("re.compile('a').search", "re.compile('b').search"),
        ("[1, 2].index", "[1, 3].index"),
        ("functools.cache(lambda x: x)", "functools.cache(lambda x: -x)"),
        ("jax.jit(lambda x: x)", "jax.jit(lambda x: -x)"),
        ("{1: 'a'}", "{'1': 'a'}"),
        ("np.random.default_rng(1)", "np.random.default_rng(2)"),
    ],
)
def test_what_is_bound_is_part_of_it(tmp_path, pair):
    lines = [f"import functools, random, re\nimport jax\nimport numpy as np\n\nthing = {each}\n" for each in pair]
    found = [of_file(tmp_path, line) for line in lines]
    assert found[0] != found[1]
    assert found[0] == of_file(tmp_path, lines[0] + "# again\n")


def test_helpers_beside_the_file_and_imports_inside_functions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    helper = tmp_path / "helper_of_mine.py"
    direct = (
        "import helper_of_mine\nfrom helper_of_mine import other\nthing = lambda x: helper_of_mine.f(x) + other(x)\n"
    )
    late = "def thing(x):\n    from helper_of_mine import f\n    return f(x)\n"
    found = []
    for body in ("x + 1", "x + 2", "x + 1  # comment"):
        helper.write_text(f"def f(x):\n    return {body}\n\ndef other(x):\n    return x\n")
        importlib.invalidate_caches()
        sys.modules.pop("helper_of_mine", None)
        found.append((of_file(tmp_path, direct), of_file(tmp_path, late)))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_recursion_and_functions_without_a_source_end():
    def countdown(n):
        return countdown(n - 1) if n else 0

    loop = []
    loop.append(loop)
    scope = {}
    exec("def f(x):\n    'doc'\n    return x + 1\ndef g(x):\n    return x + 2", scope)
    exec("def h(x):\n    'other'\n    return x + 1", scope)
    assert json.dumps([describe(countdown), describe(loop)])
    assert describe(scope["f"])["code"] == describe(scope["h"])["code"] != describe(scope["g"])["code"]


class Kept:
    calls, at = 0, None


CALLS = 0


def _counting(prompts, completions):
    global CALLS
    CALLS += 1
    Kept.calls += 1
    return [float(Kept.calls == Kept.at)] * len(completions)


def test_what_a_function_keeps_between_calls_is_no_setting_of_it():
    first = describe(_counting)
    _counting([], [])
    assert describe(_counting) == first


@dataclasses.dataclass(frozen=True)
class Scorer:
    scale: float
    table: object = None

    def __call__(self, prompts, completions):
        return [self.scale] * len(completions)


class Pair(NamedTuple):
    left: int
    right: object

    def __call__(self):
        return self.left


def test_objects_are_their_fields_and_arrays_their_content():
    assert describe(Scorer(1.0)) != describe(Scorer(2.0))
    assert describe(Pair(1, np.arange(3))) == describe(Pair(1, np.arange(3)))
    assert describe(Pair(1, np.arange(3))) != describe(Pair(1, np.arange(3)[::-1]))
    assert describe(Scorer(1.0).__call__) != describe(Scorer(2.0).__call__)
    arrays = [np.zeros(3), np.zeros(3, np.float32), np.zeros((3, 1)), jnp.ones(3), jax.random.key(0), jax.random.key(1)]
    assert len({json.dumps(describe(array)) for array in arrays}) == len(arrays)
    many = [describe(list(range(n))) for n in (1000, 1001)]
    assert many[0] != many[1]
    assert len(json.dumps(many)) < 200


def test_environments_by_what_they_are_made_of():
    made = [environments.number_guessing(high=high) for high in (20, 20, 40)]
    first, again, other = map(describe, made)
    assert first == again != other


def test_an_experiment_by_the_class_that_it_is_derived_from():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(offline.SFT):
        packing: bool = True

    found = describe(Mine(model="m", data="d"))
    assert (found["kind"], found["class"].rpartition(".")[2], found["packing"]) == ("SFT", "Mine", True)
    assert describe(functools.partial(losses.dpo_loss, beta=0.1)) == {
        "function": "rljax.losses.preference.dpo_loss",
        "beta": 0.1,
    }


# --- secrets ----------------------------------------------------------------------------------------------------------

KEY = "sk-proj-4fGh7Jk2LmN9pQrS"  # made up


def _reward(prompts, completions, *, api_key="", url="", options=None, extra=()):
    return [0.0] * len(completions)


def _with_key(key):
    return lambda prompts, completions: [len(key)] * len(completions)


class _Client:
    def __init__(self, password):
        self.password = password

    def __call__(self, prompts, completions):
        return []


@pytest.mark.parametrize(
    ("secret", "made"),
    [
        (KEY, lambda s: functools.partial(_reward, api_key=s)),
        ("hunter2", lambda s: functools.partial(_reward, options={"password": s})),
        ("abc", lambda s: functools.partial(_reward, options={"headers": {"X-Api-Key": s}})),
        ("Bearer abcdefgh1", lambda s: functools.partial(_reward, options={"Authorization": s})),
        ("hunter2", lambda s: functools.partial(_reward, url=f"https://me:{s}@host.org/v1")),
        ("hf_abcdefGHIJKL0123", lambda s: functools.partial(_reward, extra=["x", s])),
        ("q8Zk3Lw0Vb7Rt5Yx1Nc9Md2P", lambda s: functools.partial(_reward, [], [s])),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", _with_key),
        ("letmein", _with_key),
        ("hunter2", _Client),
        (KEY, lambda s: rewards.reward(functools.partial(_reward, api_key=s), weight=2.0)),
        (
            "s3",
            lambda s: dataclasses.replace(
                offline.SFT(model="m", data="d"), evaluate=functools.partial(_reward, api_key=s)
            ),
        ),
        ("s3cr3t-in-bytes", lambda s: functools.partial(_reward, api_key=s.encode())),
    ],
)
def test_secrets_are_masked_and_their_change_is_seen(secret, made):
    text = json.dumps(describe(made(secret)))
    assert secret not in text
    assert "<secret " in text
    assert text == json.dumps(describe(made(secret)))
    other = secret[:-1] + ("1" if secret[-1] != "1" else "2")
    assert text != json.dumps(describe(made(other)))


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct-GPTQ-Int4",
        "EleutherAI/pythia-2.8b-deduped",
        "/tmp/pytest-of-root/pytest-31/test_it0/runs/seed_1",
        "experiments/overoptimization_reward_models.py",
        "Once upon a time, Tom had a cat.",
        "objective/scores",
        "models/snapshots/9f8e7d6c5b4a39281706f5e4d3c2b1a0f1e2d3c4",
        "https://huggingface.co/datasets/a/b",
        "rewards/accuracies_of_2026-11-30T030924",
    ],
)
def test_names_and_texts_are_not(text):
    assert masking.masked(text) == text
    assert not masking.named_secret("eos_token")
    assert not masking.named_secret("max_tokens")
    assert not masking.named_secret("tokenizer")


def test_command_lines_are_masked():
    words = ["rljax", "run", "x.py", "--reward.api-key", "hunter2", "--reward.token=hunter2", "--steps", "5", KEY]
    found = masking.masked_command(words)
    assert "hunter2" not in " ".join(found)
    assert KEY not in " ".join(found)
    assert found[:3] + found[6:8] == ["rljax", "run", "x.py", "--steps", "5"]
