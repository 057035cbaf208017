"""Which words answer to which: the mappers against the published walk and recursion, and by hand."""
from itertools import product

import numpy as np
import pytest
import torch
from published_control import by_hand, slow_refinement, slow_replacement

from ip2p.word_alignment import refinement_mapper, replacement_mapper, word_tokens

pytestmark = pytest.mark.usefixtures("no_gradients")


def replacement_weights(source, target, tokenizer):
    return replacement_mapper(source, target, tokenizer)[0]


SAME_COUNT = [                                        # pairs of as many words
    ("a cat", "a cat"),
    ("a cat", "a dog"),
    ("a photo of lasagne on a table", "a photo of pizza on a table"),
    ("a photo of pizza on a table", "a photo of lasagne on a table"),
    ("a hippopotamus in a cathedral", "a squirrel in a castle"),
    ("a squirrel in a castle", "a hippopotamus in a cathedral"),
    ("lasagne and a cat", "pizza and a dog"),
    ("pizza", "lasagne"),
    ("lasagne", "pizza"),
    ("a tyrannosaurus eats cappuccino", "a fox eats lasagne"),
    ("a tyrannosaurus eats cappuccino", "the fox likes pizza"),
    ("the fox likes pizza", "a tyrannosaurus eats cappuccino"),
    ("a marshmallow and a lollipop", "a lollipop and a marshmallow"),
    ("a Cat on a mat", "a cat on a mat"),
    ("A photo of a House", "a painting of a house"),
    ("a cat, a dog", "a fox, a tyrannosaurus"),
    ("a cat, a dog", "a cat a dog"),
    ("a cat a dog.", "a cat, a dog"),
    ("a 1920s car", "a 2050 car"),
    ("a van-gogh painting", "a stormtrooper painting"),
    ("two red cubes beside three green cones", "three green cones beside two red cubes"),
    ("a silly-looking cat", "a 3D cat"),
]
OTHER_COUNT = [
    ("a cat", "a fluffy cat"),
    ("a fluffy cat", "a cat"),
    ("a photo of a house on a mountain", "a photo of a house on a mountain at fall"),
    ("a photo of a house", "a watercolour of a big old house in winter"),
    ("a cat", "a a cat"),
    ("a cat cat", "cat a cat a cat"),
    ("", "a cat"),
    ("a cat", ""),
    ("", ""),
    ("a red car", "blue lasagne"),
    ("cappuccino", "a cup of cappuccino with a marshmallow"),
    ("a fox, a dog and a squirrel", "A squirrel, a fox and a tyrannosaurus."),
]


def random_pairs(count, same_count, seed):
    """Sentences of easy and hard words with some replaced, and with some added or dropped unless `same_count`."""
    rng = np.random.default_rng(seed)
    words = ("a the cat dog fox red tiny on of and lasagne hippopotamus cappuccino cathedral snowy squirrel crowd lion pizza "
             "it's well-lit Lego 42 sky, robot.").split()
    for _ in range(count):
        source = list(rng.choice(words, rng.integers(1, 7)))
        target = [rng.choice(words) if rng.random() < 0.4 else word for word in source]
        if not same_count:
            target = [w for word in target for w in ([word], [word, rng.choice(words)], [])[rng.choice(3, p=[0.6, 0.2, 0.2])]]
        yield " ".join(source), " ".join(target)


def fits(tokenizer, *prompts):
    """Whether the original is defined for them."""
    return all(len(tokenizer.encode(prompt)) + 2 <= tokenizer.config.context_length for prompt in prompts)


def test_replacement_equals_the_slow_walk(tokenizer):
    for source, target in [*SAME_COUNT, *random_pairs(150, True, seed=0)]:
        if fits(tokenizer, source, target):
            mapper = replacement_weights(source, target, tokenizer)
            assert torch.equal(mapper, slow_replacement(source, target, tokenizer)), (source, target)


def test_refinement_equals_the_slow_recursion(tokenizer):
    for source, target in [*SAME_COUNT, *OTHER_COUNT, *random_pairs(60, True, seed=1), *random_pairs(60, False, seed=2)]:
        if fits(tokenizer, source, target):
            (indices, alphas), expected = refinement_mapper(source, target, tokenizer), slow_refinement(source, target, tokenizer)
            assert indices.dtype == torch.int64 and torch.equal(indices, expected[0]), (source, target)
            assert torch.equal(alphas, expected[1]), (source, target)


def test_replacement_by_hand(clip):
    """CLIP reads lasagne as two tokens and hippopotamus as three; pizza, cat and dog are one each. Behind the last change
    each position maps to itself, and it ends when the source's tokens do: the last column stays empty where it is longer."""
    def expected(first, **shares):
        return by_hand(clip, first, **shares)

    assert torch.equal(replacement_weights("a cat", "a cat", clip), torch.eye(77))
    assert torch.equal(replacement_weights("a cat", "a dog", clip), torch.eye(77))
    rest = {j: j for j in range(77)}
    one_to_two = {j: i for j, i in rest.items() if j not in (2, 3)}
    assert torch.equal(replacement_weights("a pizza here", "a lasagne here", clip), expected(one_to_two, _2_2=0.5, _2_3=0.5))
    two_to_one = {j: i for j, i in rest.items() if j not in (2, 76)}
    assert torch.equal(replacement_weights("a lasagne here", "a pizza here", clip), expected(two_to_one, _2_2=1, _3_2=1))
    both = {0: 0, 2: 3, 3: 4, 4: 5, **{j: j for j in range(5, 76)}}              # "and", "a", "dog" of "pizza and a dog"
    assert torch.equal(replacement_weights("lasagne and a cat", "pizza and a dog", clip), expected(both, _1_1=1, _2_1=1))
    third = {0: 0, 1: 1, **{j: j for j in range(5, 77)}}
    assert torch.equal(replacement_weights("a lasagne", "a hippopotamus", clip),
                       expected(third, **{f"_{i}_{j}": 1 / 3 for i in (2, 3) for j in (2, 3, 4)}))


@pytest.mark.parametrize("source, target, first", [
    ("a cat", "a fluffy cat", [0, 1, -1, 2, 3]),
    ("a fluffy cat", "a cat", [0, 1, 3, 4]),
    ("a red car", "a blue car", [0, 1, -1, 3, 4]),
    ("a cat", "a a cat", [0, 1, -1, 2, 3]),              # the later of two equal words is the new one
    ("a cat", "lasagne", [0, -1, -1, 3]),
    ("", "a cat", [0, -1, -1, 1]),
    ("a lasagne", "a big lasagne.", [0, 1, -1, 2, 3, -1, 4])])
def test_refinement_by_hand(clip, source, target, first):
    indices, alphas = refinement_mapper(source, target, clip)
    assert indices.tolist() == first + list(range(len(first), 77))
    assert alphas.tolist() == [float(i != -1) for i in first] + [1.0] * (77 - len(first))


@pytest.mark.parametrize("source, target, diagonal, shares", [
    ("a cat", "a big red cat", {0: 0, 1: 1, 4: 2, 5: 3}, {}),                           # start, a, cat, end
    ("a big red cat", "a cat", {0: 0, 1: 1, 2: 4, 3: 5}, {}),
    ("a red cat sits", "a red dog sits here", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 6: 5}, {}),
    ("A cat, sits", "a cat, sits here", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 6: 5}, {}),
    ("CAT here", "a cat  here", {0: 0, 2: 1, 3: 2, 4: 3}, {}),
    ("lasagne sits", "a pizza sits", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, {}),                # two tokens by two
    ("pizza sits", "a lasagne sits", {0: 0, 4: 2, 5: 3}, {f"_1_{j}": 1 / 3 for j in (1, 2, 3)}),
    ("", "a cat", {0: 0, 3: 1}, {}),
    ("a cat", "", {0: 0, 1: 3}, {}),
    ("", "", {0: 0, 1: 1}, {})])
def test_replacement_of_prompts_of_different_length_by_hand(clip, source, target, diagonal, shares):
    """What the original refuses: words are matched, whatever their case; a new word has no counterpart; the end keeps to
    the end, and the padding to the padding."""
    mapper = replacement_weights(source, target, clip)
    end = len(clip.encode(target)) + 2
    assert torch.equal(mapper[:, :end], by_hand(clip, diagonal, **shares)[:, :end])
    padding = mapper[:, end:]
    assert (padding.sum(0) == 1).all() and (padding.argmax(0) >= len(clip.encode(source)) + 2).all()


def words_of(count):
    """So many different words, one CLIP token each."""
    return [f"{a} {b}" for a, b in product("red blue green big old tiny wet dry hot cold".split(), "cat dog fox car".split())][:count]


@pytest.mark.parametrize("source, target", [("x" * 400, "a cat"), ("a cat", "x" * 400), ("cat " * 100, "dog " * 90),
                                            ("cat " * 100, "lasagne " * 100), ("lasagne " * 100, "cat " * 100), ("", "cat " * 100),
                                            ("cat " * 100, ""), ("日本 naïve café 🦊", "the cat"), ("\t\n", "a cat\n\tsits ")])
def test_any_prompts_give_sensible_maps(tokenizer, source, target):
    """No map is handed on more than once, but that of the last place, which stands for all padding; and every token gets one
    unless it is new."""
    M = tokenizer.config.context_length
    (mapper, new), (indices, alphas) = (find(source, target, tokenizer) for find in (replacement_mapper, refinement_mapper))
    assert mapper.shape == (M, M) and ((0 <= mapper) & (mapper <= 1)).all() and mapper[0, 0] == 1
    assert (mapper[:-1].sum(1) < 1 + 1e-6).all() and torch.equal(mapper.sum(0) == 0, new) and indices[0] == 0
    assert indices.shape == (M,) and ((-1 <= indices) & (indices < M)).all() and torch.equal(alphas, (indices >= 0).float())
    ids = tokenizer([source, target])
    end = min(len(tokenizer.encode(target)) + 2, M)
    for j in range(end):
        assert indices[j] == -1 or ids[0, indices[j]] == ids[1, j]


def test_words_keep_their_maps_in_prompts_beyond_the_context(clip):
    """80 different tokens; a word added at the front shifts each by one, a word replaced shifts none."""
    source = " ".join(words_of(40))
    ids, longer = clip([source, "new " + source])
    assert torch.equal(replacement_weights(source, source, clip), torch.eye(77))
    assert torch.equal(replacement_weights(source, source.replace("red cat", "old cat"), clip), torch.eye(77))
    indices, _ = refinement_mapper(source, "new " + source, clip)
    assert indices[:3].tolist() == [0, -1, 1] and torch.equal(ids[indices[2:76]], longer[2:76])
    mapper = replacement_weights(source, "new " + source, clip)
    assert mapper[:, 1].sum() == 0, "the new word has a counterpart"
    assert (mapper[:, 2:76].sum(0) == 1).all() and torch.equal(ids[mapper[:, 2:76].argmax(0)], longer[2:76])


@pytest.mark.parametrize("prompt, words, positions", [
    ("a cat on a mat", "cat", [2]), ("a cat on a mat", "a", [1, 4]), ("a lasagne here", "lasagne", [2, 3]),
    ("A Cat on a mat", "cat", [2]), ("a cat on a mat", "CAT", [2]), ("a cat on a mat", "mat", [5]),
    ("a red cat and a red dog", "red cat", [2, 3]), ("a red cat", "cat red", []), ("a cattle", "cat", []), ("a cat", "", []),
    ("", "cat", []), ("  a   cat ", "cat", [2]), ("cat " * 100, "cat", list(range(1, 76)))])
def test_word_tokens_by_hand(clip, prompt, words, positions):
    assert word_tokens(prompt, words, clip) == positions


@pytest.mark.parametrize("prompt, words, positions", [
    ("a cat, here.", "cat", [2]), ("a cat, here.", "here", [4]), ("a (cat) here", "here", [5]), ("a (cat) here", "(cat)", [3]),
    ('a "red" cat', "red", [3]), ("a cat, here", "cat here", [2, 4]), ("a cat here", "cat, here", [2, 3]),
    ("a cat's mat", "cat", [2]), ("a cat's mat", "cat's", [2, 3]), ("a cat's mat", "mat", [4]), ("don't", "don't", [1, 2]),
    ("a red-and-blue cat", "blue", [6]), ("a red-and-blue cat", "red-and-blue", [2, 4, 6]), ("a cat_mat", "mat", [4]),
    ("a cat , here", ",", []), ("in 2022!", "2022", [2, 3, 4, 5]), ("a &amp; cat", "cat", [3])])
def test_words_are_found_without_their_punctuation(clip, prompt, words, positions):
    assert word_tokens(prompt, words, clip) == positions


@pytest.mark.parametrize("new", range(1, 6))
def test_a_context_that_cuts_a_word_off_between_two_changes(clip, new):
    """Words new at the front push others out at the end: what lies between keeps its maps, as far as both prompts have it."""
    words = [f"lasagne{a}{b}" for a in "pqrstuvwxyz" for b in "kmn"]                     # each of several tokens, all different
    source, target = " ".join(words), " ".join(["snowy"] * new + words)
    weights, _ = replacement_mapper(source, target, clip)
    ids, longer = clip([source, target])
    assert torch.equal(weights[:, 1 + new:76].sum(0), torch.ones(75 - new))
    assert torch.equal(ids[weights[:, 1 + new:76].argmax(0)], longer[1 + new:76])
