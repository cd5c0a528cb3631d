"""Train the bundled model: a small Llama that recalls values from its prompt.

The task is associative recall. A prompt lists pairs and asks for one of them::

    k7=493; k12=018; k103=772; k12?   ->   018

Every answer depends on one exact place of the prompt and takes several decode steps, so a right
answer shows that the whole KV cache arrived at the decode worker and a wrong one shows a fault.

    python -m cluster.bundled.train_recall --out cluster/bundled/recall

The data is made here, at random, and is never stored. Contexts grow from a few pairs to the full
length once the shorter ones are learned: matching keys (an induction step) does not get off its
plateau when it is trained on long contexts from the start.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

KEYS = 200
"""Keys are k0 to k199; "k7=" (telling) and "k7?" (asking) are one token each, so that matching a
question with its pair is one induction step."""

DIGITS = 3
"""Digits of a value, one token each."""

BEGIN, END = "<|begin|>", "<|end|>"
MAX_MODEL_LEN = 8192
IGNORED_LABEL = -100

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% elif message.content %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}"
    "{% elif not loop.last %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text round-trips, and each key, digit and separator is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = [(";", "Ġ")]
    for key in range(KEYS):
        name = f"k{key}"
        merges.append((name[:-1], name[-1]))
    merges += [(f"k{key}", mark) for key in range(KEYS) for mark in "=?"]
    vocab = {token: i for i, token in enumerate([BEGIN, END, *alphabet])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"k(1\d\d|\d\d?)[=?]|\d|; ?"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that the data is made of."""

    begin: int
    end: int
    separator: int
    tell: list[int]
    ask: list[int]
    digits: list[int]

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        def token(text: str) -> int:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            assert len(ids) == 1, f"{text!r} is not one token: {ids}"
            return ids[0]

        return Vocabulary(
            begin=token(BEGIN),
            end=token(END),
            separator=token("; "),
            tell=[token(f"k{k}=") for k in range(KEYS)],
            ask=[token(f"k{k}?") for k in range(KEYS)],
            digits=[token(str(d)) for d in range(10)],
        )


def training_sequence(
    rng: random.Random, vocabulary: Vocabulary, pairs: int, queries: int
) -> tuple[list[int], list[int]]:
    """One sequence of `pairs` statements with `queries` questions strewn among and after them.

    Returns the token ids and the labels, which are set on the answers only.
    """
    keys = rng.sample(range(KEYS), pairs)
    values = [[rng.choice(vocabulary.digits) for _ in range(DIGITS)] for _ in keys]
    ids, labels = [vocabulary.begin], [IGNORED_LABEL]

    def ask(known: int) -> None:
        chosen = rng.randrange(known)
        answer = [*values[chosen], vocabulary.end]
        ids.extend([vocabulary.ask[keys[chosen]], *answer])
        labels.extend([IGNORED_LABEL, *answer])

    early = sorted(rng.randrange(1, pairs + 1) for _ in range(queries // 2))
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        ids.extend([vocabulary.tell[key], *value, vocabulary.separator])
        labels.extend([IGNORED_LABEL] * (2 + DIGITS))
        while early and early[0] == i + 1:
            early.pop(0)
            ask(i + 1)
    for _ in range(queries - queries // 2):
        ask(pairs)
    return ids, labels


def training_batch(
    rng: random.Random, vocabulary: Vocabulary, pairs: int, batch_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [sequences, tokens] int64."""
    queries = max(4, pairs)
    length = 1 + (pairs + queries) * (2 + DIGITS)
    rows = max(1, batch_tokens // length)
    made = [training_sequence(rng, vocabulary, pairs, queries) for _ in range(rows)]
    return torch.tensor([ids for ids, _ in made]), torch.tensor([labels for _, labels in made])


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.08,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, rng: random.Random, vocabulary: Vocabulary, pairs: int, prompts: int
) -> float:
    """Share of fresh prompts whose one answer is right in every digit, teacher-forced."""
    right = 0
    for _ in range(prompts):
        ids, labels = training_sequence(rng, vocabulary, pairs, 1)
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        predicted = logits[:-1].argmax(-1).tolist()
        right += all(
            p == label
            for p, label in zip(predicted, labels[1:], strict=True)
            if label != IGNORED_LABEL
        )
    return right / prompts


def train(model: LlamaForCausalLM, vocabulary: Vocabulary, args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    started = time.monotonic()
    longest, learned, step = 6, 0.0, 0
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        step += 1
        progress = elapsed / (args.minutes * 60)
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.5) / 0.5)))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / 200) * max(0.02, decay)
        pairs = longest if rng.random() < 0.5 else rng.randint(2, longest)
        ids, labels = training_batch(rng, vocabulary, pairs, args.batch_tokens)
        logits = model(input_ids=ids).logits
        target = labels[:, 1:].reshape(-1)
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, target, ignore_index=IGNORED_LABEL)
        asked = target != IGNORED_LABEL
        share = (flat[asked].argmax(-1) == target[asked]).float().mean().item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        learned = 0.95 * learned + 0.05 * share
        if learned > args.grow_at and longest < args.pairs:
            longest, learned = min(args.pairs, math.ceil(longest * 1.3)), 0.85
        if step % 100 == 0:
            print(
                f"step {step} {elapsed:.0f}s pairs<={longest} loss {loss.item():.4f} "
                f"right tokens {learned:.3f}",
                flush=True,
            )


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BEGIN,
                "eos_token": END,
                "model_max_length": MAX_MODEL_LEN,
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=199, help="longest context, 5 tokens a pair")
    parser.add_argument("--grow-at", type=float, default=0.93)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, vocabulary, args)
    save(model, tokenizer, args.out)
    model.eval()
    for pairs in (4, 16, 64, args.pairs):
        share = accuracy(model, random.Random(args.seed + 1), vocabulary, pairs, 200)
        print(f"{pairs} pairs ({1 + 5 * pairs} tokens): {share:.1%} right", flush=True)


if __name__ == "__main__":
    main()
