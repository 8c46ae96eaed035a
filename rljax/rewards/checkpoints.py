"""Rewards by models: reward models trained here, Hugging Face classifiers, and embeddings."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rljax import artefacts, data, models
from rljax.errors import UserError
from rljax.manifest import read_json
from rljax.models import encoder as encoders
from rljax.models import hf, hf_encoder, resolve
from rljax.models.heads import ScalarModel
from rljax.rewards.core import Reward, reward
from rljax.rewards.overlap import references
from rljax.rewards.text import prompt_text
from rljax.sharding import unset
from rljax.types import Params, Tokens

SHORTEST = 16  # tokens; rows are padded to this, or to 2, 4, 8, … times as much: few shapes to compile
LONGEST = 1024  # tokens of prompt and completion that a decoder reads, if max_length does not say

T = TypeVar("T")
Encoded = tuple[np.ndarray, np.ndarray]  # ids, token types; i32[n]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A reward that scores texts with a checkpoint, opened when the first batch comes (or by `opened`)."""

    path: str
    label: str | None
    output: str
    judged: str
    batch: int
    max_length: int | None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        judge = _open(self)
        return batched(judge.score, judge.params, judge.encode(prompts, completions), self.batch, judge.longest)


class Judge(NamedTuple):
    """An opened checkpoint."""

    params: Params
    score: Callable[[Params, Array, Array, Array], Array]  # (params, ids[b t], segments[b t], types[b t]) -> f32[b]
    encode: Callable[[Sequence[Any], Sequence[str]], list[Encoded]]
    longest: int  # tokens of a row
    tokenizer: Any
    decoder: ScalarModel | None  # what scores token ids, where the checkpoint is a decoder


def from_checkpoint(
    path: str,
    *,
    label: str | None = None,
    output: Literal["logit", "probability"] = "logit",
    judged: Literal["prompt+completion", "completion", "pair"] = "prompt+completion",
    weight: float | None = None,
    name: str | None = None,
    batch: int = 16,
    max_length: int | None = None,
    tokenizer: Any = None,
) -> Reward:
    """The reward that a model gives: what it makes of prompt and completion.

    path: a run of `offline.RewardModel`, a …ForSequenceClassification folder of a decoder (one label) or of BERT,
      DistilBERT or RoBERTa, or a name that resolves to one. It is read when it is needed first, so a pipeline may name
      a run that is still to come.
    label: which of an encoder's labels is good, by its name in config.json; not needed where there is one.
    output: the label's "logit", or its "probability" (sigmoid of the only logit, softmax over several).
    judged: what an encoder reads: prompt and completion as one text, the completion alone, or the two as a pair (as
      sentence pairs are told apart). A decoder reads prompt and completion with its own chat template where the prompt
      is messages, and the end token, as it was trained.
    batch, max_length: rows judged at once, and tokens of a row; longer ones lose the beginning of their prompt, and
      nothing of the completion before that. None: what an encoder was made for, 1024 for a decoder.
    tokenizer: the policy's. Given it, the checkpoint is opened now (see `opened`).
    """
    options = {"output": (output, ("logit", "probability")), "judged": (judged, JUDGED)}
    for option, (value, known) in options.items():
        if value not in known:
            raise UserError(f"from_checkpoint: {option} is {value!r}; choose one of {', '.join(map(repr, known))}")
    fn = Checkpoint(str(path), label, output, judged, batch, max_length)
    named = pathlib.Path(path).name if name is None else name
    made = reward(fn, weight=weight, name=named)
    return made if tokenizer is None else opened([made], tokenizer)[0]


JUDGED = ("prompt+completion", "completion", "pair")


def opened(rewards: Sequence[Reward], tokenizer: Any = None, *, mesh: Any = None) -> tuple[Reward, ...]:
    """The rewards with their checkpoints read, so that a wrong path is found before the first step.

    A decoder whose tokenizer is the policy's (`tokenizer`) becomes an on-device reward: it scores the token ids that
    were sampled, on the policy's mesh, where its weights are read to and nowhere else. A completion that was cut off is
    then judged as it stands; as text it would get an end token. One with a `max_length` stays on the host, where rows
    are cut to it.

    Parameters of other on-device rewards are copied to every device of the mesh, unless they are on it.
    """
    found = []
    for one in rewards:
        if isinstance(one.fn, Checkpoint):
            if tokenizer is not None and _reads_ids(one.fn, tokenizer):
                judge = _load(one.fn, mesh)
                assert judge.decoder is not None
                one = on_tokens(one, judge.decoder, judge.params)
            else:
                _open(one.fn)
        if one.params is not None and mesh is not None:
            one = dataclasses.replace(one, params=_on_mesh(one.params, mesh))
        found.append(one)
    return tuple(found)


def _on_mesh(params: Params, mesh: Mesh) -> Params:
    """Arrays that are on all devices of the mesh as they are, others on each of them."""

    def there(x: Any) -> bool:
        return isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat)

    return jax.tree.map(lambda x: x if there(x) else jax.device_put(x, NamedSharding(mesh, PartitionSpec())), params)


def on_tokens(one: Reward, decoder: ScalarModel, params: Params) -> Reward:
    """The reward of a decoder's checkpoint as a JAX function of token ids."""
    fn = functools.partial(_token_scores, decoder, checkpoint=one.fn.path, output=one.fn.output)
    return dataclasses.replace(one, fn=fn, params=params, on_device=True)


def embedding_similarity(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
    encoder: str = "all-minilm-l6-v2",
    batch: int = 32,
) -> list[float | None]:
    """Cosine of the embeddings of completion and reference (see `overlap`; the nearest of several), in [−1, 1].

    encoder: a folder of BERT, DistilBERT or RoBERTa weights, as sentence-transformers writes them, or a name that
      resolves to one. Texts are cut to what it was made for.
    """
    wanted = references("embedding_similarity", answer, reference)
    model, params, tokenizer, embed = _embedder(encoder)
    texts = list(dict.fromkeys([*completions, *(text for row in wanted for text in row or ())]))
    longest = model.config.max_tokens
    encoded = _encode(tokenizer, texts, longest)
    found = batched(embed, params, encoded, batch, longest)
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    place = {text: row for row, text in enumerate(texts)}
    return [
        None if row is None else max(float(found[place[text]] @ found[place[one]]) for one in row)
        for text, row in zip(completions, wanted, strict=True)
    ]


# --- scoring ----------------------------------------------------------------------------------------------------------


def batched(
    function: Callable[[Params, Array, Array, Array], Array],
    params: Params,
    rows: Sequence[Encoded],
    batch: int,
    longest: int,
) -> np.ndarray:
    """function(params, ids, segments, types) of all rows, `batch` at a time, those of like length together."""
    if batch < 1:
        raise UserError(f"rewards are judged batch={batch} rows at a time: give at least 1")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    parts = []
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        width = SHORTEST
        while width < len(rows[some[-1]][0]):
            width *= 2
        ids, segments, types = np.zeros((3, batch, min(width, longest)), np.int32)
        for place, row in enumerate(some):
            n = len(rows[row][0])
            ids[place, :n], types[place, :n], segments[place, :n] = *rows[row], 1
        with unset():
            parts.append(np.asarray(function(params, ids, segments, types))[: len(some)])  # pyright: ignore[reportArgumentType]
    out = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return out[np.argsort(order)] if parts else out


def _token_scores(model: ScalarModel, params: Params, tokens: Tokens, *, checkpoint: str, output: str) -> Array:
    """f32[b]; `checkpoint` says in the record of a run where the params come from."""
    return _pick(model.scores(params, tokens)[:, None], 0, output)


def _pick(logits: Array, index: int, output: str) -> Array:
    """f32[b] of f32[b n]: one label's logit or probability."""
    if output == "logit":
        return logits[:, index]
    return jax.nn.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else jax.nn.softmax(logits, axis=1)[:, index]


# --- opening ----------------------------------------------------------------------------------------------------------


def _kept(load: Callable[[Any], T]) -> Callable[[Any], T]:
    """`load` with its latest results kept; threads that ask at once load once, which lru_cache does not see to. Nothing
    is on a run's mesh: whoever judges on the host does so apart from other processes.
    """
    cached, lock = functools.lru_cache(maxsize=8)(load), threading.Lock()

    @functools.wraps(load)
    def locked(what: Any) -> T:
        with lock, unset():
            return cached(what)

    return locked


@_kept
def _open(source: Checkpoint) -> Judge:
    """On one device of this process, which judges by itself."""
    return _load(source, None)


def _load(source: Checkpoint, mesh: Mesh | None) -> Judge:
    """mesh: of a decoder's weights."""
    folder = _folder(source)
    if _is_run(folder):
        return _load_run(source, folder, mesh)
    if _is_encoder(folder):
        return _load_encoder(source, folder)
    model, params = hf.load_reward(folder, mesh=mesh)
    return _decoder(source, models.reward_model(model), params, resolve.load_tokenizer(folder))


def _reads_ids(source: Checkpoint, tokenizer: Any) -> bool:
    """Whether it is a decoder that can score the ids of this tokenizer. No weights are read."""
    folder = _folder(source)
    if source.max_length is not None or _is_encoder(folder):
        return False
    named = (read_json(folder / "experiment.json") or {}).get("model") if _is_run(folder) else folder
    return same_tokenizer(resolve.load_tokenizer(str(named)), tokenizer)


def _folder(source: Checkpoint) -> pathlib.Path:
    folder = pathlib.Path(source.path).expanduser()
    return folder if _is_run(folder) else resolve.resolve(source.path)


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / "experiment.json").is_file()


def _is_encoder(folder: pathlib.Path) -> bool:
    config = read_json(folder / "config.json") if folder.is_dir() and not _is_run(folder) else None
    return bool(config) and config.get("model_type") in {family.model_type for family in hf_encoder.FAMILIES}


def _load_run(source: Checkpoint, folder: pathlib.Path, mesh: Mesh | None) -> Judge:
    start, params, _ = artefacts.open_run(folder, mesh=mesh)
    if "head" not in params:
        raise UserError(f"{folder} is the run of a policy, which gives no rewards: name one of offline.RewardModel")
    accelerated = jax.default_backend() != "cpu"
    compute = (read_json(folder / "experiment.json") or {}).get("compute_dtype")
    compute = compute or ("bfloat16" if accelerated else "float32")
    model = models.build(dataclasses.replace(start.model.config, compute_dtype=compute))
    params = {**params, "model": {name: leaf for name, leaf in params["model"].items() if name != "unembed"}}
    return _decoder(source, models.reward_model(model), params, start.tokenizer)


def _decoder(source: Checkpoint, model: ScalarModel, params: Params, tokenizer: Any) -> Judge:
    if source.judged != "prompt+completion":
        raise UserError(f"{source.path} is a decoder, which reads prompt and completion: leave judged out")
    _label(source, ("LABEL_0",))  # the name that transformers gives to the only label
    longest = _limit(source, model.config.max_positions, min(LONGEST, model.config.max_positions))

    @jax.jit
    def score(params: Params, ids: Array, segments: Array, types: Array) -> Array:
        tokens = Tokens(ids=ids, segments=segments, mask=jnp.zeros(ids.shape, bool))
        return _pick(model.scores(params, tokens)[:, None], 0, source.output)

    def encode(prompts: Sequence[Any], completions: Sequence[str]) -> list[Encoded]:
        rows = [_ids(prompt, text, tokenizer, longest) for prompt, text in zip(prompts, completions, strict=True)]
        return [(ids, np.zeros_like(ids)) for ids in rows]

    return Judge(params, score, encode, longest, tokenizer, model)


def _ids(prompt: Any, completion: str, tokenizer: Any, longest: int) -> np.ndarray:
    """Prompt, completion and end token, as comparisons are tokenised (`data.comparison_example`)."""
    row = {"prompt": prompt, "completion": completion}
    whole = data.completion_example(row, tokenizer)
    if len(whole.ids) <= longest:
        return whole.ids
    said = min(len(whole.ids) - whole.prompt, max(1, longest - min(whole.prompt, 1)))
    return data.completion_example(row, tokenizer, max_prompt=max(1, longest - said), max_completion=said).ids[:longest]


def _load_encoder(source: Checkpoint, folder: pathlib.Path) -> Judge:
    model, params = encoders.load(folder)
    index = _label(source, model.config.labels)
    longest = _limit(source, model.config.max_positions, model.config.max_tokens)
    tokenizer = resolve.load_tokenizer(folder)
    tokenizer.truncation_side = "left"  # what was written stands at the end
    tokenizer.backend_tokenizer.no_truncation()  # a file may ask for some
    tokenizer.backend_tokenizer.no_padding()
    typed = source.judged == "pair" and model.config.num_types > 1

    @jax.jit
    def score(params: Params, ids: Array, segments: Array, types: Array) -> Array:
        logits = model.classify(params, ids, segments, types=types if typed else None)
        return _pick(logits, index, source.output)

    def encode(prompts: Sequence[Any], completions: Sequence[str]) -> list[Encoded]:
        before = [prompt_text(prompt) for prompt in prompts]
        if source.judged == "pair":
            return [_encode_pair(tokenizer, *both, longest) for both in zip(before, completions, strict=True)]
        if source.judged == "completion":
            return _encode(tokenizer, completions, longest)
        texts = [start + text for start, text in zip(before, completions, strict=True)]
        return _encode(tokenizer, texts, longest)

    return Judge(params, score, encode, longest, tokenizer, None)


def _encode_pair(tokenizer: Any, prompt: str, completion: str, longest: int) -> Encoded:
    """Two texts told apart. The prompt makes room, from its beginning on, and the completion only where it must."""
    backend = tokenizer.backend_tokenizer
    first, second = (backend.encode(text, add_special_tokens=False) for text in (prompt, completion))
    room = max(0, longest - backend.num_special_tokens_to_add(True))
    second.truncate(room, direction="left")
    first.truncate(room - len(second), direction="left")
    both = backend.post_process(first, second)
    return np.asarray(both.ids, np.int32), np.asarray(both.type_ids, np.int32)


def _encode(tokenizer: Any, texts: Sequence[str], longest: int) -> list[Encoded]:
    if not texts:
        return []
    out = tokenizer(list(texts), truncation=True, max_length=longest, return_token_type_ids=True, verbose=False)
    columns = zip(out["input_ids"], out["token_type_ids"], strict=True)
    return [(np.asarray(ids, np.int32), np.asarray(types, np.int32)) for ids, types in columns]


@_kept
def _embedder(name: str) -> tuple[Any, Params, Any, Callable[..., Array]]:
    folder = resolve.resolve(name)
    model, params = encoders.load(folder)

    @jax.jit
    def embed(params: Params, ids: Array, segments: Array, types: Array) -> Array:
        return encoders.embed(model, params, ids, segments)

    return model, params, resolve.load_tokenizer(folder), embed


def _label(source: Checkpoint, labels: Sequence[str]) -> int:
    """Which output is asked for."""
    if not labels:
        raise UserError(f"{source.path} has no classifier: name a …ForSequenceClassification checkpoint")
    if source.label is None and len(labels) == 1:
        return 0
    if source.label not in labels:
        asked = "no label was named" if source.label is None else f"{source.label!r} is none of them"
        raise UserError(f"{source.path} tells {len(labels)} labels apart ({', '.join(labels)}), and {asked}: set label")
    return labels.index(source.label)


def _limit(source: Checkpoint, positions: int, default: int) -> int:
    if source.max_length is None:
        return default
    if not 1 <= source.max_length <= positions:
        raise UserError(
            f"max_length={source.max_length}, but {source.path} has {positions} positions: 1 to {positions}"
        )
    return source.max_length


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of every text and dialogue, and end them alike."""
    if one is other:
        return True

    def essence(tokenizer: Any) -> Any:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        whole = {name: value for name, value in whole.items() if name not in ("truncation", "padding")}
        settings = ("bos_token_id", "eos_token_id", "add_bos_token", "chat_template")
        return whole, [getattr(tokenizer, name, None) for name in settings]

    fast = all(hasattr(tokenizer, "backend_tokenizer") for tokenizer in (one, other))
    return fast and essence(one) == essence(other)
