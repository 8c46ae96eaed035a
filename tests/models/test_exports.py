"""What an export says beside the weights: where texts end, what pads, and which ids have a token."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer

from rljax import artefacts, policy
from rljax.data import chat
from rljax.errors import UserError
from rljax.models import hf, hf_pad
from rljax.models.resolve import load_tokenizer
from tests.data.conftest import SMOLLM2

TURNS = SMOLLM2.replace("<|im_end|>", "<turn_end>").replace("<|im_start|>", "<turn_start>")


def changed(source, folder, *, tokens=(), template=None, pad=None, rows=0):
    """A copy of a checkpoint whose tokenizer has more tokens, and whose embedding has more rows."""
    shutil.copytree(source, folder)
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    if rows:
        model, params = hf.load(source, dtype="float32")
        more = 0.02 * jax.random.normal(jax.random.key(0), (rows, model.config.hidden_size))
        for path in (("embed", "tokens"), ("unembed", "kernel")):
            if path[0] in params:
                table = params[path[0]][path[1]]
                grown = table.shape[0] == model.config.vocab_size
                params[path[0]][path[1]] = jnp.concatenate([table, more if grown else more.T], 0 if grown else 1)
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": model.config.vocab_size + rows}
        grown = hf.hf_read.config_of(config, "test")
        shutil.rmtree(folder)
        hf.save(folder, hf.build(grown), params)
        written = json.loads((folder / "config.json").read_text()) | {
            name: config[name] for name in ("bos_token_id", "eos_token_id")
        }
        (folder / "config.json").write_text(json.dumps(written))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def turned(stories, tmp_path_factory):
    """A base checkpoint whose chat template ends turns in another token than eos, with eight rows more than tokens."""
    folder = tmp_path_factory.mktemp("turned") / "model"
    return changed(stories, folder, tokens=("<turn_start>", "<turn_end>"), template=TURNS, rows=10)


def test_a_template_that_ends_turns_in_another_token_than_eos(turned, tmp_path):
    start = policy.load(str(turned), dtype="float32")
    end = start.tokenizer.convert_tokens_to_ids("<turn_end>")
    assert chat.stop_ids(start.tokenizer) == (end,)
    assert start.stop_ids == (start.tokenizer.eos_token_id, end)
    assert policy.stopping(start, (".",)).stop_ids == (*start.stop_ids, *policy.named_stops((".",), start.tokenizer))
    assert policy.stopping(start, ("<turn_end>",)).stop_ids == start.stop_ids
    hf.save(tmp_path / "out", start.model, start.params, tokenizer=start.tokenizer, stop_ids=start.stop_ids)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(start.stop_ids)
    start.tokenizer.chat_template = None
    start.tokenizer.save_pretrained(tmp_path / "out")  # the export says it by itself
    assert policy.load(str(tmp_path / "out"), dtype="float32").stop_ids == start.stop_ids


def test_an_export_that_says_all_its_ends_is_as_it_was(stories, tmp_path):
    start = policy.load(str(stories), dtype="float32")
    for name, ends in (("with", start.stop_ids), ("without", ())):
        hf.save(tmp_path / name, start.model, start.params, stop_ids=ends)
    files = [sorted((p.name, content(p)) for p in (tmp_path / name).iterdir()) for name in ("with", "without")]
    assert files[0] == files[1]


def content(path):
    """Bytes; of tensors with the header read, whose metadata safetensors writes in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_which_ids_have_no_token(turned):
    start = policy.load(str(turned), dtype="float32")
    assert start.model.config.vocab_size == 522
    assert start.absent == ((514, 522),)


def test_tokens_beyond_the_embedding_are_refused(stories, tmp_path):
    folder = changed(stories, tmp_path / "more", tokens=("<new>", "<newer>"))
    with pytest.raises(UserError, match=r"2 tokens beyond the 512 rows of its embedding \('<new>' is 512\), .*resize"):
        policy.load(str(folder))
    tokenizer = load_tokenizer(stories)
    assert policy.absent_ids(tokenizer, 512, "x") == ()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})  # Gemma 3's text models
    assert policy.absent_ids(tokenizer, 512, "x") == ()
    assert policy.absent_ids(tokenizer, 520, "x") == ((513, 520),)


def test_a_reward_models_pad_token_ends_no_text(turned, stories, tmp_path):
    """transformers scores the last token that is not it."""
    start = policy.load(str(turned), dtype="float32")
    tokenizer, ends = start.tokenizer, set(start.stop_ids)
    tokenizer.pad_token = tokenizer.eos_token
    source = {"vocab_size": 522, "eos_token_id": 2, "pad_token_id": 2}
    config, written = hf_pad.apart(source, tokenizer, start.stop_ids)
    assert config["pad_token_id"] == written.pad_token_id == tokenizer.unk_token_id
    assert config["pad_token_id"] not in ends
    assert tokenizer.pad_token == tokenizer.eos_token  # the run's own is as it was
    tokenizer.pad_token = "<unk>"
    assert hf_pad.apart(source, tokenizer, start.stop_ids) == ({**source, "pad_token_id": 0}, tokenizer)
    alone = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    only = type("Only", (), {"added_tokens_decoder": {}, "eos_token_id": 2, "pad_token_id": 2, "backend": alone})
    assert hf_pad.apart(source, only, ()) == ({**source, "pad_token_id": None}, only)
    assert hf_pad.apart(source, None, ())[0]["pad_token_id"] is None
    assert hf_pad.apart(source | {"pad_token_id": 7}, None, ())[0]["pad_token_id"] == 7


def test_a_reward_models_bias_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rljax": {"reward_bias": -0.25}}))
    assert "score (-0.25, from normalising)" in artefacts.remark(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert artefacts.remark(tmp_path) == ""
