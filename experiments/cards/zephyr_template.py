"""Zephyr, before its first step: Mistral-7B with the chat template of Zephyr, which the base model lacks.

    rljax run experiments/cards/zephyr_template.py

Writes a checkpoint folder of links to the model's weights and of its tokenizer, whose template is that of the recipe
(huggingface/alignment-handbook, recipes/zephyr-7b-beta/sft/config_full.yaml).
"""

import pathlib

from rljax.models import resolve

TURN = "{{{{ '<|{0}|>\\n' + message['content'] + eos_token }}}}\n"
TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n" + TURN.format("user") + "{% elif message['role'] == 'system' %}\n"
    ""
    + TURN.format("system")
    + "{% elif message['role'] == 'assistant' %}\n"
    + TURN.format("assistant")
    + "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def main(*, model: str = "mistralai/Mistral-7B-v0.1", out: str = "runs/zephyr_template/model") -> int:
    """Give a model Zephyr's chat template.

    Args:
        model: a folder, or a name on the Hugging Face hub
        out: the folder that is written
    """
    source, folder = resolve.resolve(model).resolve(), pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = folder / file.name
        if file.is_file() and not link.exists():
            link.symlink_to(file.resolve())
    tokenizer = resolve.load_tokenizer(source)
    tokenizer.chat_template = TEMPLATE
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)  # a link, through which the source would be written
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model} with the chat template of Zephyr")
    return 0


if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
