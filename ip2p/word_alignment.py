"""Which words of one prompt answer to which of another, as Prompt-to-Prompt (`prompt_to_prompt.py`) has it."""
import re
from difflib import SequenceMatcher
from itertools import accumulate

import torch
from torch import Tensor

from .text import Tokenizer


def word_spans(prompt: str, tokenizer: Tokenizer) -> list[tuple[str, range]]:
    """Each word and the positions of its tokens, as far as they fit the context."""
    spans, start, most = [], 1, tokenizer.config.context_length - 1          # the start token comes first, the end token last
    for word in prompt.split():
        end = min(start + len(tokenizer.encode(word)), most)
        if start < end:
            spans.append((word, range(start, end)))
        start = end
    return spans


def word_tokens(prompt: str, words: str, tokenizer: Tokenizer) -> list[int]:
    """Positions of a word's tokens wherever it stands in the prompt, or of several words' in a row, whatever the case and
    without the punctuation around and between them. Empty where the prompt lacks them."""
    parts = [part for word, span in word_spans(prompt, tokenizer) for part in _parts(word, span, tokenizer)]
    wanted = [text for word in words.split() for text, _ in _parts(word, range(len(tokenizer.encode(word))), tokenizer)]
    n = len(wanted)
    found = [i for i in range(len(parts) - n + 1) if n and [text for text, _ in parts[i:i + n]] == wanted]
    return [token for i in found for _, span in parts[i:i + n] for token in span]


# What CLIP's tokenizer never joins: endings such as "'s", letters and digits, punctuation.
PARTS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W_]+|[\W_]+", re.IGNORECASE)


def _parts(word, span, tokenizer):
    """[(text, positions)] of what a word is made of, its punctuation left out: "dog's" is dog and 's."""
    texts = PARTS.findall(word)
    counts = [len(tokenizer.encode(text)) for text in texts]
    if sum(counts) != len(tokenizer.encode(word)):                            # the tokenizer put something in its place
        return [(word.casefold(), span)]
    ends = list(accumulate(counts))
    return [(text.casefold(), span[end - count:end]) for text, count, end in zip(texts, counts, ends)
            if any(c.isalnum() for c in text) and span[end - count:end]]


def replacement_mapper(source: str, target: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Weight [i, j] of source token i's map in the map of target token j, as Prompt-to-Prompt's AttentionReplace has it.

    Returns (M, M) weights, M = 77 or the model's own context length, and which target tokens have no counterpart, (M,) bool.
    A word that stays keeps its maps. A word that was replaced hands its maps on, token by token, or 1 / n of them to each of
    n tokens where the numbers differ. As in the original, each position after the last change is mapped to itself. Prompts of
    unequal numbers of words, which the original refuses, are aligned here, and words without a counterpart have columns of zeros.
    """
    M = tokenizer.config.context_length
    mapper, new = torch.zeros(M, M), torch.zeros(M, dtype=torch.bool)
    xs, ys = word_spans(source, tokenizer), word_spans(target, tokenizer)
    whole = max(len(tokenizer.encode(text)) for text in (source, target)) <= M - 2       # not cut off by the context
    same_count = whole and len(xs) == len(ys)
    changes = [(x, y) for (a, x), (b, y) in zip(xs, ys) if a != b] if same_count else _aligned_changes(xs, ys, tokenizer)
    i = j = 0                                                                # mapped so far
    for x, y in changes:
        alike = min(x.start - i, y.start - j)                                 # they differ where the context cut a word off
        mapper[torch.arange(i, i + alike), torch.arange(j, j + alike)] = 1
        if not x:
            new[y.start:y.stop] = True
        elif len(x) == len(y):
            mapper[torch.arange(x.start, x.stop), torch.arange(y.start, y.stop)] = 1
        elif y:
            mapper[x.start:x.stop, y.start:y.stop] = 1 / len(y)
        i, j = x.stop, y.stop
    for k in range(M - j):
        if not same_count:
            mapper[min(i + k, M - 1), j + k] = 1
        elif i + k < M:                          # the original's walk ends with the source's tokens: columns may stay empty
            mapper[j + k, j + k] = 1
    return mapper, new


def _aligned_changes(xs, ys, tokenizer):
    """Pairs of ranges of source and target tokens that replace each other, in order, where the words differ in number."""
    def split(spans):
        """The tokens of each word, by which words are compared; and where each begins, with the end of the last."""
        return ([tuple(tokenizer.encode(word)) for word, _ in spans],
                [span.start for _, span in spans] + [spans[-1][1].stop if spans else 1])

    (x_words, x_starts), (y_words, y_starts) = split(xs), split(ys)
    changes = []
    for kind, a, b, c, d in SequenceMatcher(None, x_words, y_words, autojunk=False).get_opcodes():
        if kind != "equal" and b - a == d - c:                               # word by word
            changes += [(xs[a + k][1], ys[c + k][1]) for k in range(b - a)]
        elif kind != "equal":
            changes.append((range(x_starts[a], x_starts[b]), range(y_starts[c], y_starts[d])))
    return changes


def refinement_mapper(source: str, target: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """For each target token, the source token that it aligns with, as Prompt-to-Prompt's AttentionRefine has it.

    Returns indices (M,) int64, -1 where a token is new, and alphas (M,), 0 where it is new and 1 elsewhere. The alignment
    is Needleman and Wunsch's on token ids with gap 0, match 1, mismatch -1, which is a longest common subsequence; ties
    go left, then up. Behind the prompt's end each position maps to itself.
    """
    M = tokenizer.config.context_length
    xs, ys = ([tokenizer.start, *tokenizer.encode(text)[:M - 2], tokenizer.end] for text in (source, target))
    score = [[0] * (len(ys) + 1) for _ in range(len(xs) + 1)]
    for i, x in enumerate(xs, 1):
        for j, y in enumerate(ys, 1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if x == y else -1))
    indices = torch.arange(M)
    i, j = len(xs), len(ys)
    while j > 0:
        if i == 0 or score[i][j] == score[i][j - 1]:
            j -= 1
            indices[j] = -1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            indices[j] = i
    return indices, (indices >= 0).float()
