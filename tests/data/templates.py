"""Chat templates in the shapes of public ones, and tokenizers that have their special tokens."""

from tests.data.conftest import byte_level

# ruff: noqa: E501
CALL = "{{ '{\"name\": \"' ~ f.name ~ '\", \"arguments\": ' }}{{ f.arguments | tojson }}{{ '}' }}"

QWEN25 = (  # results of tools are the user's, calls follow the words; arguments are always written as JSON
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}{% for c in m.tool_calls %}{% if c.function is defined %}"
    "{% set f = c.function %}{% else %}{% set f = c %}{% endif %}{{ '\n<tool_call>\n' }}"
    + CALL
    + "{{ '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content }}"
    "{{ '\n</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # thoughts are kept after the last question only; an empty block where the last answer has none
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}{% for c in m.tool_calls %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '{% set f = c.function or c %}{{ \'<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA31 = (  # one call, and no words beside it; a null list of calls would be counted
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}"
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only single calls') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{ m.content | tojson }}<|eot_id|>"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # v0.3: the tools and the system prompt stand before the last question, and calls have ids of 9 letters
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{% if tools and m == asked[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}"
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have 9') }}"
    "{% endif %}{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last else ']' }}"
    "{% endfor %}{{ eos_token }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system, no tools, no calls; the assistant is the model
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HARMONY = (  # gpt-oss: channels; the last answer ends in <|return|>, earlier ones in <|end|>, a call in <|call|>
    "{% set ns = namespace(name='') %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if 'tool_calls' in m %}{% set f = m.tool_calls[0].function or m.tool_calls[0] %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}{{ f.arguments | tojson }}"
    "<|call|>{% set ns.name = f.name %}{% elif loop.last and not add_generation_prompt %}"
    "{% if 'thinking' in m %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% elif m.role == 'tool' %}"
    "{{ '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' }}{{ m.content | tojson }}<|end|>"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DEEPSEEK = (  # V3: asks whether a content is null, writes arguments as they are, needs a call's type; drops thoughts
    "{% set ns = namespace(tool=false) %}{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' and 'tool_calls' in m %}{% set ns.tool = false %}"
    "{{ '<｜Assistant｜>' if m.content is none else '<｜Assistant｜>' + m.content }}{{ '<｜tool▁calls▁begin｜>' }}"
    "{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\n```json\n' "
    "+ c.function.arguments + '\n```<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1] %}"
    "{{ content if ns.tool else '<｜Assistant｜>' + content }}<｜end▁of▁sentence｜>{% else %}{% set ns.tool = true %}"
    "{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜>' }}{% endif %}"
)
R1 = DEEPSEEK.replace("{{ '<｜Assistant｜>' }}{% endif %}", "{{ '<｜Assistant｜><think>\n' }}{% endif %}")
PHI3 = (  # eos after the whole dialogue, behind the end of the turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = (  # no end of turn at all
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "{{ '\n' + k + '=' + v | string }}{% endfor %}{{ '\n</tool_call>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML, HEADERS = ["<|im_start|>", "<tool_call>", "</tool_call>"], ["<|start_header_id|>", "<|end_header_id|>"]
SHAPES = {  # name: (template, further added tokens, eos, bos, what ends an answer of text, what ends a call)
    "qwen2.5": (QWEN25, CHATML, "<|im_end|>", None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (QWEN3, [*CHATML, "<think>", "</think>"], "<|im_end|>", None, "<|im_end|>", "<|im_end|>"),
    "llama3.1": (LLAMA31, HEADERS, "<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]", "[TOOL_CALLS]"], "</s>", "<s>", "</s>", "</s>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>", "<end_of_turn>", None),
    "gpt-oss": (
        HARMONY,
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"],
        "<|return|>",
        None,
        "<|return|>",
        "<|call|>",
    ),
    "deepseek": (
        DEEPSEEK,
        [
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
            "</think>",
        ],
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "r1": (
        R1,
        ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁end｜>", "<think>", "</think>"],
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "phi3": (PHI3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|endoftext|>", None, "<|end|>", None),
    "glm": (GLM, ["<|user|>", "<|assistant|>", "<tool_call>", "</tool_call>"], "<|endoftext|>", None, "", ""),
}


def tokenizer_of(name):
    """A byte-level tokenizer with the special tokens of a template; tool markers are added tokens, not special ones."""
    template, added, eos, bos, _, _ = SHAPES[name]
    tokenizer = byte_level()
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
    tokenizer.chat_template = template
    return tokenizer
