"""Chat templates of every temperament: the trained text is written out."""

import re

import numpy as np
import pytest

from rljax import data
from tests.data.conftest import byte_level

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n"

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOSE = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")  # marks leave the end out
STRIPPED = (  # Llama 2's and Mistral's manner: contents stripped, a space around answers, only answers end
    "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content | trim }} [A]"
    "{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)
BARE = (  # no special token at all
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # Qwen3's manner: an empty <think> block in the last answer, and thoughts left out of earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].replace('<think>', '').strip() if '</think>' in m.content else '' }}"
    "\n</think>\n\n{% endif %}{{ answer }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def say(*contents):
    return [
        {"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, contents, strict=False)
    ]


def trained(example, tokenizer):
    """The trained runs of tokens as texts."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.mask.astype(np.int8), [0]])))
    return [tokenizer.decode(example.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def chat(messages, tokenizer, **limits):
    return data.chat_example({"messages": messages}, tokenizer, **limits)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def same_as_template(example, messages, tokenizer):
    return example.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


def test_smollm2_trains_contents_and_their_ends_in_every_turn(chatml):
    messages = say("hello", "hi there 🙂", "hi there 🙂", "")  # the user repeats the answer; the last answer is empty
    example = chat(messages, chatml)
    assert trained(example, chatml) == [f"hi there 🙂{END}", END]
    assert same_as_template(example, messages, chatml)
    assert chatml.decode(example.ids) == (
        f"{SYSTEM}{START}user\nhello{END}\n{START}assistant\nhi there 🙂{END}\n"
        f"{START}user\nhi there 🙂{END}\n{START}assistant\n{END}\n"
    )


@pytest.mark.parametrize("content", ["a\r\nb", "  padded  ", "é🙂", "assistant\n", "RLJAX2TURN", "RLJAXMARK", "x\n"])
def test_awkward_contents(chatml, content):
    messages = [{"role": "system", "content": content}, *say(content, content, "more", content)]
    example = chat(messages, chatml)
    assert trained(example, chatml) == [f"{content}{END}"] * 2
    assert same_as_template(example, messages, chatml)


def test_end_tokens_inside_contents(chatml):
    messages = say(f"inner {END} end", "fine")
    assert trained(chat(messages, chatml), chatml) == [f"fine{END}"]
    assert same_as_template(chat(messages, chatml), messages, chatml)
    for row in ({"messages": say("a", f"x{END}y")}, {"prompt": say("a"), "completion": f"x{END}y"}):
        form = data.chat_example if "messages" in row else data.completion_example
        with pytest.raises(ValueError, match=re.escape(f"message 1 holds {END!r}, where generation stops")):
            form(row, chatml)


def test_a_dialogue_that_goes_on_after_the_answer(chatml):
    assert trained(chat(say("a", "b", "c"), chatml), chatml) == [f"b{END}"]


@pytest.mark.parametrize("trim", [False, True])
def test_trimmed_offsets(trim):
    tokenizer = byte_level(trim_offsets=trim)
    for content in ("   indented\n", " ", "\n\n", "a  "):
        assert trained(chat(say("  q  ", content), tokenizer), tokenizer) == [f"{content}{END}"]


@pytest.mark.parametrize("trim", [False, True])
def test_trimmed_offsets_without_end_token(trim):
    template = "{% for m in messages %}{{ m.role }}>{{ m.content }}|{% endfor %}"
    template += "{% if add_generation_prompt %}assistant>{% endif %}"
    tokenizer = with_template(byte_level(trim_offsets=trim), template)
    assert trained(chat(say("q", "a  ", "q", "b  "), tokenizer), tokenizer) == ["a  |", f"b  |{END}"]


def test_cut_dialogue(chatml):
    whole = chat(say("hello", "hi there"), chatml)
    cut = chat(say("hello", "hi there"), chatml, max_length=len(whole.ids) - 2)
    assert cut.ids.tolist() == whole.ids[:-2].tolist()
    assert trained(cut, chatml) == ["hi there"]


def test_generation_marks_are_followed(fresh):
    messages = say("hello", "hi", "more", "yes ")
    tokenizer = with_template(fresh, MARKED)
    assert trained(chat(messages, tokenizer), tokenizer) == [f"hi{END}", f"yes {END}"]
    assert same_as_template(chat(messages, tokenizer), messages, tokenizer)
    tokenizer = with_template(fresh, LOOSE)
    assert trained(chat(messages, tokenizer), tokenizer) == ["hi", "yes "]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert trained(data.completion_example(row, tokenizer), tokenizer) == [f"yes {END}"]  # a completion always ends


def test_a_completion_trains_all_after_the_generation_prompt(fresh):
    template = MARKED.replace(
        "{% generation %}", "> {% generation %}"
    )  # the prompt ends before what the marks leave out
    tokenizer = with_template(fresh, template)
    example = data.completion_example({"prompt": say("a"), "completion": "b"}, tokenizer)
    assert trained(example, tokenizer) == [f"> b{END}"]


def test_only_the_token_that_ends_answers_is_trained(fresh):
    tokenizer = with_template(
        fresh,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.last %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    assert trained(chat(say("a", "b", "c", "d"), tokenizer), tokenizer) == ["b", f"d{END}"]


def test_stripped_contents(fresh):
    tokenizer = with_template(fresh, STRIPPED)
    messages = say(" hello ", " hi\n", "more", "yes")
    example = chat(messages, tokenizer)
    assert trained(example, tokenizer) == [f" hi {END}", f" yes {END}"]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert trained(data.completion_example(row, tokenizer), tokenizer) == [f" yes {END}"]


def test_template_without_special_tokens(fresh):
    tokenizer = with_template(fresh, BARE)
    assert tokenizer.decode(chat(say("hello", "hi"), tokenizer).ids) == f"user: hello\nassistant: hi{END}"
    assert trained(chat(say("hello", "hi", "q", "yes"), tokenizer), tokenizer) == [
        " hi",
        f"yes{END}",
    ]  # " hi" is one token
    example = data.completion_example({"prompt": say("hello"), "completion": "hi"}, tokenizer)
    assert trained(example, tokenizer) == [f"hi{END}"]


def test_templates_that_rewrite_contents(fresh):
    tokenizer = with_template(fresh, THINKING)
    thought = "<think>\nwell\n</think>\n\nyes"
    # Nothing to rewrite: all that generation has to write after the prompt.
    assert trained(chat(say("a", "b", "c", "d"), tokenizer), tokenizer) == [f"b{END}", f"<think>\n\n</think>\n\nd{END}"]
    # Contents that the template strips, and contents that look like our placeholders.
    assert trained(chat(say("a", "\nb", "c", "\nd"), tokenizer), tokenizer) == [
        f"b{END}",
        f"<think>\n\n</think>\n\nd{END}",
    ]
    assert trained(chat(say("RLJAX1TURN", "b", "RLJAX3TURN", "d"), tokenizer), tokenizer)[0] == f"b{END}"
    # Only the last answer may have thoughts.
    assert trained(chat(say("a", thought), tokenizer), tokenizer) == [f"{thought}{END}"]
    row = {"prompt": say("a", "b", "c"), "completion": thought}
    assert trained(data.completion_example(row, tokenizer), tokenizer) == [f"{thought}{END}"]
    row = {"prompt": say("a"), "completion": "b"}
    assert trained(data.completion_example(row, tokenizer), tokenizer) == [f"<think>\n\n</think>\n\nb{END}"]
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        chat(say("a", thought, "c", "d"), tokenizer)


def test_generation_prompt_must_begin_the_answer(fresh):
    tokenizer = with_template(fresh, MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    with pytest.raises(ValueError, match=r"training would not see what generation sees.*<think>"):
        data.completion_example({"prompt": say("a"), "completion": "b"}, tokenizer)


def test_completion_of_several_messages_trains_the_assistant_only(chatml):
    completion = [*say("", "one")[1:], {"role": "tool", "content": "data"}, {"role": "assistant", "content": "two"}]
    for messages in (completion, [*completion, {"role": "user", "content": "bye"}]):
        example = data.completion_example({"prompt": say("a"), "completion": messages}, chatml)
        assert trained(example, chatml) == [f"one{END}", f"two{END}"]
        assert chatml.decode(example.ids).endswith(f"{START}tool\ndata{END}\n{START}assistant\ntwo{END}")


@pytest.mark.parametrize("content", ["hi", "", "  x", "\n", "🙂", "42 apples."])
def test_prompt_and_answer_are_the_template_tokenised_once(chatml, content):
    example = data.completion_example({"prompt": say("hello"), "completion": content}, chatml)
    once = chatml.apply_chat_template(say("hello", content))["input_ids"]
    prompt = chatml.apply_chat_template(say("hello"), add_generation_prompt=True)["input_ids"]
    newline = chatml("\n")["input_ids"]
    assert example.ids.tolist() + newline == once
    assert example.ids[: example.prompt].tolist() == prompt == data.prompt_ids(say("hello"), chatml).tolist()
    assert trained(example, chatml) == [f"{content}{END}"]
    assert example.ids[-1] == chatml.eos_token_id == chatml.pad_token_id


def test_template_with_bos_gets_no_second_one(fresh):
    tokenizer = with_template(fresh, "{{ bos_token }}" + BARE)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_bos_token = True
    for example in (
        chat(say("a", "b"), tokenizer),
        data.completion_example({"prompt": say("a"), "completion": "b"}, tokenizer),
    ):
        assert example.ids.tolist().count(tokenizer.bos_token_id) == 1
        assert example.ids[0] == tokenizer.bos_token_id
    ids = data.prompt_ids(say("long " * 50), tokenizer, max_prompt=5)
    assert (len(ids), ids[0]) == (5, tokenizer.bos_token_id)


def test_tool_calls(chatml, fresh):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(
        fresh, template.replace("{{ m.content }}<", "{{ m.content or m.tool_calls[0].function.name }}<", 1)
    )
    messages = [*say("a"), call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]
    assert trained(chat(messages, tokenizer), tokenizer) == [f"add{END}", f"four{END}"]
    with pytest.raises(ValueError, match="the chat template does not write the call of 'add' in message 1"):
        chat(messages, chatml)  # SmolLM2's template has contents only


def test_tokenizer_without_template(plain):
    message = "has no chat template, which rows with messages need: start from a chat (instruct) checkpoint"
    with pytest.raises(ValueError, match=re.escape(message)):
        chat(say("a", "b"), plain)
    with pytest.raises(ValueError, match=re.escape(message)):
        data.prompt_ids(say("a"), plain)


def test_template_that_refuses(fresh):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses messages of the roles user, assistant: roles must alternate"):
        chat(say("a", "b"), with_template(fresh, template))
