"""What is shown of held-out prompts."""

from rljax import evaluation


def test_a_history_of_tool_calls_is_shown():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    prompt = [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "yes"},
    ]
    written = '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]'
    wanted = ["user: Will it rain?", *[f"assistant: {written}"] * 2, f"assistant: Let me see. {written}", "tool: yes"]
    assert evaluation.shown(prompt) == "\n".join(wanted)
    assert evaluation.shown("Once") == "Once"
