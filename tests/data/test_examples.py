"""The set of trained tokens is written out for every kind of row (TRAPS 13, 14, 16)."""

import re

import numpy as np
import pytest

from rljax import data

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n"


def parts(example, tokenizer):
    """(the prompt's text, the trained text), with special tokens; what is neither must not be there."""
    assert example.ids.dtype == np.int32
    assert example.mask.dtype == bool
    assert example.ids.shape == example.mask.shape
    trained = np.flatnonzero(example.mask)
    assert trained.tolist() == list(range(max(1, example.prompt), len(example.ids)))
    return tokenizer.decode(example.ids[: example.prompt]), tokenizer.decode(example.ids[example.prompt :])


def complete(tokenizer, prompt, completion, **limits):
    return data.completion_example({"prompt": prompt, "completion": completion}, tokenizer, **limits)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_text_trains_all_but_the_first_token_and_ends_once(plain):
    ids = plain("Once upon a time")["input_ids"]
    example = data.text_example({"text": "Once upon a time"}, plain)
    assert example.ids.tolist() == [*ids, plain.eos_token_id]
    assert example.mask.tolist() == [False, True, True, True, True]
    for text in ("Once upon a time</s>", "Once upon a time</s></s>"):
        assert data.text_example({"text": text}, plain).ids.tolist() == example.ids.tolist()


def test_text_with_bos_has_it_once(plain):
    plain.add_bos_token = True
    for text in ("Once", "<s>Once"):
        example = data.text_example({"text": text}, plain)
        assert plain.convert_ids_to_tokens(example.ids) == ["<s>", "▁Once", "</s>"]
        assert example.mask.tolist() == [False, True, True]


def test_cut_text_has_no_end(plain):
    example = data.text_example({"text": "Once upon a time"}, plain, max_length=4)
    assert example.ids.tolist() == plain("Once upon a time")["input_ids"]
    for bos in (False, True):
        plain.add_bos_token = bos
        with pytest.raises(ValueError, match="field 'text' is empty"):
            data.text_example({"text": ""}, plain)


# --- prompts and completions as texts ---------------------------------------------------------------------------------


def test_completion_is_what_tokenising_once_gives(plain):
    example = complete(plain, "Once upon a time", " there was")
    once = plain("Once upon a time there was")["input_ids"]
    assert example.ids.tolist() == [*once, plain.eos_token_id]
    assert example.prompt == 4
    assert example.mask.tolist() == [False] * 4 + [True] * (len(once) - 4 + 1)
    assert example.ids[:4].tolist() == data.prompt_ids("Once upon a time", plain).tolist()


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Question: how", " many apples"),
        ("The answer: ", "42 apples"),
        ("The ans", "wer: 42"),
        ("Once up", "on a time"),
        ("a", "b"),
        ("\n\n", "\n x"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_keeps_the_tokens_that_generation_sees(chatml, plain, prompt, completion, bos):
    plain.add_bos_token = bos
    for tokenizer in (chatml, plain):
        example = complete(tokenizer, prompt, completion)
        seen = data.prompt_ids(prompt, tokenizer).tolist()
        assert seen == tokenizer(prompt)["input_ids"]
        assert example.ids[: example.prompt].tolist() == seen
        text = tokenizer.decode(example.ids[example.prompt :], skip_special_tokens=True)
        assert text.lstrip(" ") == completion.lstrip(" ")
        whole = tokenizer.decode(example.ids, skip_special_tokens=True)
        assert whole == prompt + completion  # no space slips in between
        once = tokenizer(prompt + completion)["input_ids"]
        if once[: len(seen)] == seen:
            assert example.ids.tolist() == [*once, tokenizer.eos_token_id]


def test_merging_across_the_border(chatml):
    assert (
        chatml("The answer: 42")["input_ids"][: len(chatml("The answer: ")["input_ids"])]
        != chatml("The answer: ")["input_ids"]
    )
    assert parts(complete(chatml, "The answer: ", "42"), chatml) == ("The answer: ", f"42{END}")


@pytest.mark.parametrize("completion", [" was", " was</s>", " was</s></s>"])
def test_one_end_token_and_nothing_after_it(plain, completion):
    example = complete(plain, "Once", completion)
    assert example.ids.tolist().count(plain.eos_token_id) == 1
    assert example.ids[-1] == plain.eos_token_id
    assert parts(example, plain) == ("Once", "was</s>")  # the tokenizer's decoder drops a leading space


def test_empty_completion_is_its_end(plain, chatml):
    assert parts(complete(plain, "Once", ""), plain) == ("Once", "</s>")
    assert parts(complete(chatml, "hello", END), chatml) == ("hello", END)


@pytest.mark.parametrize("completion", [" was</s> and more</s>", "costs <s>10</s> 8", "</s>x"])
def test_end_token_inside_a_completion(plain, completion):
    with pytest.raises(ValueError, match="the completion holds '</s>', the token where generation stops"):
        complete(plain, "Once", completion)


def test_empty_prompt_is_at_least_a_beginning_of_sequence(plain):
    for form, row in {
        data.completion_example: {"prompt": "", "completion": "Once upon"},
        data.preference_example: {"prompt": "", "chosen": "a", "rejected": "b"},
        data.prompt_example: {"prompt": ""},
    }.items():
        with pytest.raises(ValueError, match="the prompt is empty"):
            form(row, plain)
    plain.add_bos_token = True
    example = complete(plain, "", "Once upon")
    assert (example.prompt, example.mask.tolist()) == (1, [False, True, True, True])
    assert plain.convert_ids_to_tokens(example.ids) == ["<s>", "▁Once", "▁upon", "</s>"]


def test_long_prompts_keep_their_tail_and_long_completions_their_head(plain):
    example = complete(plain, "Once upon a time", " there was", max_prompt=2, max_completion=1)
    assert plain.convert_ids_to_tokens(example.ids) == ["▁a", "▁time", "▁there"]  # cut: no end token is pretended
    assert example.mask.tolist() == [False, False, True]
    plain.add_bos_token = True
    for limit, expected in {1: ["<s>"], 2: ["<s>", "▁time"], 5: ["<s>", "▁Once", "▁upon", "▁a", "▁time"]}.items():
        ids = data.prompt_ids("Once upon a time", plain, max_prompt=limit)
        assert plain.convert_ids_to_tokens(ids) == expected
        assert complete(plain, "Once upon a time", " x", max_prompt=limit).ids[:limit].tolist() == ids.tolist()


def test_end_fits_exactly_or_is_cut(plain):
    whole = complete(plain, "Once", " upon a")
    assert complete(plain, "Once", " upon a", max_completion=3).ids.tolist() == whole.ids.tolist()
    assert complete(plain, "Once", " upon a", max_completion=2).ids.tolist() == whole.ids[:-1].tolist()


@pytest.mark.parametrize("limit", ["max_prompt", "max_completion"])
def test_limits_must_leave_a_token(plain, limit):
    with pytest.raises(ValueError, match=f"{limit}=0 leaves no token"):
        complete(plain, "Once", " upon", **{limit: 0})


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧 naïve", "a\r\nb\r\n", "\u0000\u2028", "  two  spaces  ", "\ttab\n\n\n"])
def test_unusual_text_survives(chatml, plain, text):
    for tokenizer in (chatml, plain):
        example = complete(tokenizer, "a:" + text, text + "b")
        decoded = tokenizer.decode(example.ids, skip_special_tokens=True)
        assert decoded == "a:" + text + text + "b"
        assert example.mask.sum() == len(example.ids) - example.prompt


def test_very_long_rows(chatml):
    example = complete(chatml, "The lazy dog. " * 20_000, " The quick fox" * 20_000, max_prompt=64, max_completion=64)
    assert (example.prompt, len(example.ids), int(example.mask.sum())) == (64, 128, 64)


def test_a_tokenizer_that_appends_its_own_end_or_cuts_does_no_harm(plain):
    expected = complete(plain, "Once upon", " a").ids.tolist()
    plain.add_eos_token = True
    assert complete(plain, "Once upon", " a").ids.tolist() == expected
    plain.add_eos_token = False
    plain.backend_tokenizer.enable_truncation(2)
    plain.backend_tokenizer.enable_padding(length=9)
    assert complete(plain, "Once upon", " a").ids.tolist() == expected


def test_tokenizer_without_end_token(plain):
    plain.eos_token = None
    with pytest.raises(ValueError, match=re.escape("has no end-of-sequence token")):
        complete(plain, "Once", " upon")


# --- the other kinds --------------------------------------------------------------------------------------------------


def test_preference_texts(plain):
    row = {"prompt": "Once", "chosen": " upon a", "rejected": ""}
    chosen, rejected = data.preference_example(row, plain)
    assert (parts(chosen, plain), parts(rejected, plain)) == (("Once", "upon a</s>"), ("Once", "</s>"))
    assert chosen.ids[: chosen.prompt].tolist() == rejected.ids[: rejected.prompt].tolist()


@pytest.mark.parametrize("form", ["preference", "comparison"])
def test_prompts_that_completions_repeat_are_taken_once(plain, chatml, form):
    def both(row, tokenizer):
        if form == "preference":
            return data.preference_example(row, tokenizer)
        two = [row.pop("chosen"), row.pop("rejected")]
        return data.comparison_example({**row, "completions": two, "best": 0}, tokenizer).examples

    row = {"prompt": "Once upon", "chosen": "Once upon a time", "rejected": "Once upon"}
    assert [parts(one, plain) for one in both(row, plain)] == [("Once upon", "a time</s>"), ("Once upon", "</s>")]
    row = {"prompt": "Once", "chosen": "Once upon", "rejected": "upon"}  # by chance
    assert parts(both(row, plain)[0], plain)[1] == "Once upon</s>"
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am"}]
    row = {"prompt": begun, "chosen": "I am 42", "rejected": "I am here"}
    assert [parts(one, chatml)[1] for one in both(row, chatml)] == [f" 42{END}", f" here{END}"]


def test_preference_dialogues_share_their_prompt(chatml):
    ask = {"role": "user", "content": "hello"}
    row = {
        side: [ask, {"role": "assistant", "content": text}] for side, text in {"chosen": "hi", "rejected": "no"}.items()
    }
    chosen, rejected = data.preference_example(row, chatml)
    prompt = f"{SYSTEM}{START}user\nhello{END}\n{START}assistant\n"
    assert (parts(chosen, chatml), parts(rejected, chatml)) == ((prompt, f"hi{END}"), (prompt, f"no{END}"))
    cut = data.preference_example(row, chatml, max_prompt=5, max_completion=1)
    assert parts(cut[0], chatml)[0].endswith("assistant\n")
    assert cut[0].ids[:5].tolist() == cut[1].ids[:5].tolist() == chosen.ids[chosen.prompt - 5 : chosen.prompt].tolist()


def test_hh_texts(plain):
    start = "\n\nHuman: hello \n\nAssistant:"
    chosen, rejected = data.preference_example({"chosen": f"{start} hi", "rejected": f"{start} no"}, plain)
    assert parts(chosen, plain) == (start, "hi</s>")
    assert parts(rejected, plain) == (start, "no</s>")


def test_unpaired_and_mismatched(plain):
    rows = [
        {"prompt": "Once", "completion": " upon", "label": True},
        {"prompt": "a b", "completion": " c d", "label": False},
    ]
    first, second = (data.unpaired_example(row, plain) for row in rows)
    assert (first.desirable, second.desirable) == (True, False)
    crossed = data.mismatch(first.example, second.example)
    assert parts(crossed, plain) == ("Once", "c d</s>")
    assert parts(data.mismatch(second.example, first.example), plain) == ("a b", "upon</s>")


def test_comparison(plain):
    row = {"prompt": "Once", "completions": [" a", " b", ""], "best": 2}
    item = data.comparison_example(row, plain)
    assert (item.best, item.margin) == (2, 0.0)
    assert [parts(example, plain)[1] for example in item.examples] == ["a</s>", "b</s>", "</s>"]
    pair = data.comparison_example({"prompt": "Once", "chosen": " a", "rejected": " b", "margin": 1.5}, plain)
    assert (len(pair.examples), pair.best, pair.margin) == (2, 0, 1.5)


def test_prompt_example(chatml):
    example = data.prompt_example({"prompt": "hello"}, chatml)
    assert example.ids.tolist() == chatml("hello")["input_ids"]
    assert (example.mask.any(), example.prompt) == (False, len(example.ids))
