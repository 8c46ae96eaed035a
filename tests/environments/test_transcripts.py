"""Prompts, actions and observations as tokens, against the chat template's own tokens and written out."""

import numpy as np
import pytest

from rljax import data
from rljax.environments import transcripts
from rljax.environments.transcripts import Transcript
from tests.data.conftest import SMOLLM2
from tests.data.test_chat import BARE, END, LOOSE, MARKED, START, STRIPPED, SYSTEM, THINKING, say, with_template

ROOM = {"max_prompt": 512, "vocab": 1000}


def talk(tokenizer, prompt, *exchanges):
    """The transcript after actions (token ids) that are each followed by observations, ready for the next action."""
    now = transcripts.read(Transcript(prompt), tokenizer, **ROOM)
    for ids, *observations in exchanges:
        ids = np.asarray(ids, np.int32)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        now = transcripts.act(now, ids, np.zeros(len(ids), np.float32), text, finished=True)
        for observation in observations:
            now = transcripts.hear(now, observation)
        now = transcripts.read(now, tokenizer, **ROOM)
    return now


def answer(tokenizer, prompt, text):
    """The tokens that a perfectly trained model writes after a prompt of messages, its end of turn included."""
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
    example = data.completion_example(row, tokenizer)
    return example.ids[example.prompt :].tolist()


@pytest.mark.parametrize("template", [None, MARKED, LOOSE, STRIPPED])
@pytest.mark.parametrize("contents", [("hello", "hi there", "a\nb  c", "é🙂", "?"), ("  q  ", "x", "y", "\nz", "w")])
def test_a_dialogue_is_the_templates_own_tokens(fresh, template, contents):
    tokenizer = fresh if template is None else with_template(fresh, template)
    u1, a1, u2, a2, u3 = contents
    first = answer(tokenizer, say(u1), a1)
    second = answer(tokenizer, say(u1, a1, u2), a2)
    now = talk(tokenizer, say(u1), (first, say(u2)), (second, say(u3)))
    whole = tokenizer.apply_chat_template(say(u1, a1, u2, a2, u3), add_generation_prompt=True)["input_ids"]
    assert now.ids.tolist() == whole
    assert [piece.logps is not None for piece in now.pieces] == [False, True, False, True, False]
    assert now.pieces[1].ids.tolist() == first
    assert now.pieces[3].ids.tolist() == second


def test_a_template_for_a_tokenizer_that_begins_words_with_a_space(plain):
    """SentencePiece's manner: behind a special token a text gets the space of a beginning, and so does ours."""
    plain.chat_template = SMOLLM2.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    first = answer(plain, say("hello"), "hi there")
    assert first[-1] == plain.eos_token_id
    now = talk(plain, say("hello"), (first, say("what?")))
    whole = plain.apply_chat_template(say("hello", "hi there", "what?"), add_generation_prompt=True)["input_ids"]
    assert now.ids.tolist() == whole


def test_an_answer_without_its_end_is_closed_by_the_template(chatml):
    """TRAPS 17: the end of turn that the policy did not write is there, and not its own."""
    cut = chatml.encode("hi the", add_special_tokens=False)
    now = talk(chatml, say("hello"), (cut, say("what?")))
    assert now.pieces[1].ids.tolist() == cut
    assert chatml.decode(now.pieces[2].ids) == f"{END}\n{START}user\nwhat?{END}\n{START}assistant\n"
    assert chatml.decode(now.ids) == (
        f"{SYSTEM}{START}user\nhello{END}\n{START}assistant\nhi the{END}\n{START}user\nwhat?{END}\n{START}assistant\n"
    )


def test_another_stop_token_does_not_pass_for_the_end_of_turn(chatml):
    now = talk(chatml, say("hello"), ([*chatml.encode("hi"), 0], say("what?")))  # 0 is <|endoftext|>
    assert chatml.decode(now.pieces[2].ids).startswith(f"{END}\n{START}user\n")


def test_a_template_without_end_tokens(fresh):
    tokenizer = with_template(fresh, BARE)
    now = talk(tokenizer, say("hello"), ([*tokenizer.encode("hi"), tokenizer.eos_token_id], say("what?")))
    assert tokenizer.decode(now.ids) == f"user: hello\nassistant: hi{END}\nuser: what?\nassistant: "


def test_a_template_that_rewrites_earlier_answers_does_not_rewrite_tokens(fresh):
    """TRAPS 18: Qwen3's template drops thoughts from earlier answers; what was generated stays."""
    tokenizer = with_template(fresh, THINKING)
    written = tokenizer.encode(f"<think>\nhm\n</think>\n\nhi{END}", add_special_tokens=False)
    now = talk(tokenizer, say("hello"), (written, say("what?")))
    assert now.pieces[1].ids.tolist() == written
    assert tokenizer.decode(now.ids).endswith(
        f"assistant\n<think>\nhm\n</think>\n\nhi{END}\n{START}user\nwhat?{END}\n{START}assistant\n"
    )


def test_several_messages_are_one_observation(chatml):
    hi = [*chatml.encode("hi"), chatml.eos_token_id]
    tool = [{"role": "tool", "content": "42"}]
    apart, together = (
        talk(chatml, say("q"), (hi, tool, say("go on"))),
        talk(chatml, say("q"), (hi, tool + say("go on"))),
    )
    assert apart.ids.tolist() == together.ids.tolist()
    assert chatml.decode(apart.pieces[2].ids) == (
        f"\n{START}tool\n42{END}\n{START}user\ngo on{END}\n{START}assistant\n"
    )


def test_a_text_in_the_middle_of_an_answer(chatml):
    """A tool that answers within the assistant's turn: text as it is, and one end of turn after all of it."""
    now = talk(
        chatml,
        say("q"),
        (chatml.encode("2*3="), "[6]"),
        ([*chatml.encode("so 6"), chatml.eos_token_id], say("thanks")),
    )
    expected = f"{START}assistant\n2*3=[6]so 6{END}\n{START}user\nthanks{END}\n{START}assistant\n"
    assert chatml.decode(now.ids).endswith(expected)


def test_texts_are_continuations(plain):
    """TRAPS 14: no space and no beginning-of-sequence token inside a row, also where the tokenizer adds both."""
    plain.add_bos_token = True
    begin = plain.encode("Once", add_special_tokens=True)
    assert begin[0] == plain.bos_token_id
    action = plain.encode(" upon", add_special_tokens=False)
    now = talk(plain, "Once", (action, "Hello."))
    assert now.pieces[0].ids.tolist() == begin
    assert plain.convert_ids_to_tokens(now.pieces[2].ids.tolist()) == ["H", "e", "ll", "o", "."]
    assert plain.bos_token_id not in now.ids[1:]


def test_ids_are_taken_as_they_are(chatml):
    now = talk(chatml, np.asarray([7, 8]), ([9], np.asarray([10, 2])))
    assert now.ids.tolist() == [7, 8, 9, 10, 2]


def test_what_is_heard_before_the_first_action_belongs_to_the_prompt(chatml):
    start = transcripts.hear(Transcript(say("rules")), say("x", "hello")[1:])
    now = transcripts.read(start, chatml, **ROOM)
    assert len(now.pieces) == 1
    assert chatml.decode(now.ids).endswith(f"rules{END}\n{START}assistant\nhello")  # an answer begun, which goes on
    text = transcripts.read(transcripts.hear(Transcript("rules"), " go"), chatml, **ROOM)
    assert chatml.decode(text.ids) == "rules go"
    short = transcripts.read(transcripts.hear(Transcript("rules"), " go"), chatml, max_prompt=4, vocab=1000)
    assert short.ids.tolist() == text.ids[-4:].tolist()


def test_prompts_keep_their_end(chatml):
    now = transcripts.read(Transcript(np.arange(9)), chatml, max_prompt=4, vocab=1000)
    assert now.ids.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ("", "has no tokens"),
        (np.zeros(0, np.int32), "has no tokens"),
        (np.asarray([3, 1000]), "0 to 999"),
        (np.asarray([-1]), "0 to 999"),
        (np.asarray([0.5]), "a row of token ids"),
        (np.asarray([[1]]), "a row of token ids"),
        ([{"role": "user", "content": "x"}], "begin with messages"),
    ],
)
def test_nonsense_is_refused(chatml, observation, message):
    with pytest.raises(ValueError, match=message):
        talk(chatml, "a prompt", ([5], observation))


def test_wrong_messages_are_refused(chatml):
    with pytest.raises(ValueError, match="observation: message 0 is"):
        talk(chatml, say("q"), ([5], [{"content": "x"}]))
    with pytest.raises(ValueError, match="the prompt is empty"):
        talk(chatml, "")
    with pytest.raises(ValueError, match="a row of token ids"):
        talk(chatml, None)


def test_rewards_land_on_the_last_action(chatml):
    now = transcripts.give(talk(chatml, "p", ([5], "x"), ([6], "y")), 0.5)
    assert [piece.reward for piece in now.pieces] == [0, 0, 0, 0.5, 0]
    assert [piece.reward for piece in transcripts.give(now, -2.0).pieces] == [0, 0, 0, -1.5, 0]
    untouched = talk(chatml, "p")
    assert transcripts.give(untouched, 1.0) is untouched
