"""A CLIP tokenizer whose merges are learned from a few prompts."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


def make_tokenizer(prompts: list[str], max_length: int, vocab_size: int = 1024) -> CLIPTokenizer:
    """Trains byte-level BPE on `prompts` and returns a stock `CLIPTokenizer`."""
    end = "</w>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=end))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        end_of_word_suffix=end,
        show_progress=False,
    )
    tokenizer.train_from_iterator([p.lower() for p in prompts], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens.
    tokens = [*alphabet, *(a + end for a in alphabet)]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    tokens += [a + b for a, b in merges if a + b not in tokens]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {token: i for i, token in enumerate(tokens)}
    build: Any = CLIPTokenizer  # annotated for paths, takes the tables themselves
    return build(vocab=vocab, merges=merges, model_max_length=max_length)
