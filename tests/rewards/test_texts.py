"""What rewards see of what was written: special tokens on request, and what a prompt has already opened."""

import functools

import jax
import numpy as np
import pytest

from rljax import data, hosts, judges, policy, prompts, rewards, sharding
from rljax.environments import single_turn
from rljax.environments.turns import Written
from rljax.types import Tokens
from tests.data.conftest import SMOLLM2, byte_level
from tests.rewards.support import COMPLETION_IDS, PROMPT_IDS

GOOD, TAIL = "<think>two\nlines</think>\n<answer>4</answer>", "two\nlines</think>\n<answer>4</answer>"
R1 = SMOLLM2.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
assert R1 != SMOLLM2


@pytest.mark.parametrize(
    ("prompt", "before", "completion", "score"),
    [
        ([{"role": "user", "content": "2+2?"}], "<|im_start|>assistant\n<think>\n", TAIL, 1),
        ("2+2? <think>\n", "2+2? <think>\n", TAIL, 1),  # as R1-zero's text prompts end
        ("2+2? <think>\n", "2+2? <think>\n", GOOD, 1),
        ("2+2?", "2+2?", GOOD, 1),
        ("2+2?", "2+2?", TAIL, 0),
        ("2+2? <think>\n", "2+2? <think>\n", "no end <answer>4</answer>", 0),
        ("Think in <think>. 2+2?", "Think in <think>. 2+2?", TAIL, 0),  # quoted, not opened
        ("Write <think></think><answer></answer>", "Write <think></think><answer></answer>", "", 0),
        ("Write <think></think><answer></answer>", "Write <think></think><answer></answer>", GOOD, 1),
        ("x", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<answer>4</answer>", 1),  # thoughts turned off
        ([{"role": "assistant", "content": "<think>Well, "}], "<think>Well, ", TAIL, 1),  # an answer begun
        ([{"role": "user", "content": "<think>Well, "}], "<think>Well, <|im_end|>", TAIL, 0),
    ],
)
def test_format_reward_knows_what_the_prompt_has_opened(prompt, before, completion, score):
    assert rewards.format_reward([prompt], [completion], prompt_texts=[before]) == [score]


def test_a_header_is_no_part_of_a_form():
    loose = functools.partial(rewards.format_reward, pattern=r"<.*>")
    assert loose(["x"], ["foo>"], prompt_texts=["<|user|>\nx<|assistant|>\n"]) == [0]
    bracket = functools.partial(rewards.format_reward, pattern=r"\[THINK\].*\[/THINK\].+")
    assert bracket(["x"], ["so[/THINK]4"], prompt_texts=["[INST]x[/INST][THINK]"]) == [1]


def test_columns_are_made_for_those_who_ask():
    def blind(prompts, completions, **fields):
        assert not {"raw_completions", "prompt_texts"} & set(fields)
        return [float("<think>" in text) for text in completions]

    def sees(prompts, completions, *, raw_completions, prompt_texts):
        return [float("<think>" in raw and "<think>" not in text) for raw, text in zip(raw_completions, completions)]  # noqa: B905

    keeps = rewards.reward(blind, name="keeps", special_tokens=True)
    said = rewards.start(
        rewards.as_rewards([blind, sees, keeps]),
        ["p"] * 2,
        ["a", "b"],
        fields={},
        prompt_ids=PROMPT_IDS[:2],
        completion_ids=COMPLETION_IDS[:2],
        raw_completions=["<think>a", "b"],
    ).result(timeout=10)
    assert {name: values.tolist() for name, values in said.parts.items()} == {
        "blind": [0, 0],
        "sees": [1, 0],
        "keeps": [1, 0],
    }
    assert rewards.wants([keeps], "raw_completions")
    assert rewards.wants(rewards.as_rewards(sees), "prompt_texts")
    assert not rewards.wants(rewards.as_rewards(blind), "raw_completions")
    assert rewards.reward(keeps, weight=2.0).special_tokens
    assert not rewards.reward(keeps, special_tokens=False).special_tokens


@pytest.fixture(scope="module")
def thinker():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = R1
    return tokenizer


def judged(tokenizer, asked, texts, *, said=None, batches=1):
    """What rewards say of these completions of one prompt of messages."""
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}
    source = data.Rows(lambda i: row, 1, "row {}".format)
    run = type("Run", (), {"max_prompt": 64, "batch": 1, "seed": 0, "environment": None})
    rows = prompts.prompts(run, tokenizer, source)
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width, longest = rows.width, max(map(len, written))
    before = policy.left_pad([rows.ids(0)] * len(texts), rows=len(texts), width=width)
    ids, mask = np.zeros((len(texts), longest), np.int32), np.zeros((len(texts), longest), bool)
    for i, one in enumerate(written):
        ids[i, : len(one)], mask[i, : len(one)] = one, True
    tokens = Tokens(
        ids=np.concatenate([before.ids, ids], 1),
        segments=np.concatenate([before.segments, mask.astype(np.int32)], 1),
        mask=np.concatenate([before.mask, mask], 1),
    )
    made = judges.make(
        rewards.as_rewards(asked),
        tokenizer=tokenizer,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        timeout=10,
        stop=None,
        say=([] if said is None else said).append,
        stop_ids=(tokenizer.eos_token_id,),
    )
    made = made._replace(poll=lambda: None)
    for _ in range(batches):
        scores = judges.start(made, rows, [0] * len(texts), tokens, hosts.share_of_known(len(texts)))()
    return scores


def test_a_format_of_special_tokens_after_a_generation_prompt_that_opens_it(thinker):
    scores = judged(
        thinker, rewards.format_reward, [f"{TAIL}<|im_end|>", f"{GOOD}<|im_end|>", "4<|im_end|>", f"{TAIL} so"]
    )
    assert scores.total.tolist() == [1, 1, 0, 0]


def test_it_is_said_once_which_special_tokens_rewards_do_not_see(thinker):
    def plain(prompts, completions):
        assert completions[0] == "so4"
        return [1.0] * len(completions)

    said = []
    judged(thinker, plain, ["so</think>4<|im_end|>"], said=said, batches=2)
    assert len(said) == 1
    assert "special tokens </think>, " in said[0]
    assert "rewards.reward(plain, special_tokens=True)" in said[0]
    for quiet, texts in ((rewards.format_reward, ["so</think>"]), (plain, ["so4<|im_end|>"])):
        said.clear()
        judged(thinker, quiet, texts, said=said)
        assert said == []


def test_it_is_said_once_that_a_reward_applies_to_nothing(thinker):
    def never(prompts, completions):
        return [None] * len(completions)

    def one(prompts, completions):
        return [1.0] * len(completions)

    said = []
    judged(thinker, never, ["4", "5"], said=said, batches=2)
    assert said == ["no reward applies to any of 2 completions (all said None): they train nothing"]
    said.clear()
    judged(thinker, [one, never], ["4", "5"], said=said, batches=5)
    assert said == ["the reward never said None of every completion of 3 batches: it applies to none"]


def test_an_environments_reward_sees_them_too():
    environment = single_turn(rewards.format_reward)
    state, _ = environment.reset({"prompt": "2+2?"}, 0)
    text = Written("two\nlines\n<answer>4</answer>", raw=TAIL, prompt="2+2?<think>\n")
    assert environment.step(state, text, np.zeros(3, np.int32))[1].reward == 1
    assert environment.step(state, str(text), np.zeros(3, np.int32))[1].reward == 0
