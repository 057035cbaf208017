"""The language model that writes edits, from the world's captions and 700 triples: `train.py --stage edits`."""
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from .edits import EditWriter, completion_loss, make_completion, make_prompt, read_triples
from .encodings import pack_encoding, train_encoding
from .gpt import GPT, GPTConfig, save_gpt
from .stages import run
from .tensorfiles import round_weights, small_dtype
from .world import SPLITS
from .world_reader import judge, relexicalize

TRIPLES = [Path(__file__).parent / "assets" / "triples" / name for name in ("world.jsonl", "photos.jsonl")]
EDITS = GPTConfig(vocab_size=2048, context_length=128, width=192, layers=4, heads=6)


def train_edits(args, world):
    """First the world's captions, each followed by the same scene's after some change, so that the model learns to repeat a
    sentence but for a word; then triples, with the loss on the completion alone as in the paper. Its own first stage falls
    away where it starts from public GPT-2 weights (--base).

    700 triples are few for a small model. So unless --verbatim or --base is given, three times out of four it learns from one
    that the world's grammar can read, put in other words of the world (`relexicalize`); and a quarter of these begin, before
    and after the edit, with a few words out of the other triples' captions, half of them with their letters shuffled, so
    that it learns to repeat what it does not know. The world's own instructions are not used.
    """
    triples = read_triples(args.triples)
    if args.base:
        writer = EditWriter.load(args.base, args.device)
        model, encoding = writer.model.requires_grad_(True), writer.encoding
    else:
        texts = [world.caption(args.seed + 4, i)[1] for i in range(3000)] + [text for t in triples for text in t.values()]
        encoding = train_encoding(texts + [make_prompt("") + make_completion("", "")] * 1000, EDITS.vocab_size)
        model = GPT(EDITS).to(args.device)
        writer = EditWriter(model, encoding)
    readable = [] if args.verbatim or args.base else [t for t in triples if judge(*t.values())[1] == "right"]
    others = [t["input"].split() for t in triples if t not in readable and len(t["input"]) < 60]
    encode, first = encoding.encode_ordinary, 0 if args.base else args.pretrain_steps
    lengths = [len(encode(make_prompt(t["input"]))) + len(encode(make_completion(t["edit"], t["output"]))) for t in triples]
    if max(lengths) > model.config.context_length:
        raise ValueError(f"a triple of {max(lengths)} tokens is more than the context's {model.config.context_length}: "
                         f"{triples[lengths.index(max(lengths))]}")

    def captions_loss(step, length=65):
        """The world's captions in pairs, before and after a change, as one text, cut off at `length` tokens."""
        edits, rows = iter(range(step * 8 * args.batch_size, (step + 1) * 8 * args.batch_size)), []
        for _ in range(args.batch_size):
            tokens = []
            while len(tokens) < length:
                edit = world.edit(args.seed + 4, next(edits))
                tokens += encode(f"{edit.caption}\n{edit.edited_caption}\n\n")
            rows.append(tokens[:length])
        ids = torch.tensor(rows, device=args.device)
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    def triples_loss(step):
        rng, pairs = random.Random(f"{args.seed}/{step}"), []
        for _ in range(args.batch_size):
            triple = rng.choice(triples)
            if readable and rng.random() < .75:
                triple = relexicalize(rng.choice(readable), rng, world) or triple
                if others and rng.random() < .25:
                    words = rng.choice(others)
                    start = rng.randrange(len(words))
                    some = words[start:start + rng.randint(1, 3)]
                    some = [w if rng.random() < .5 else "".join(rng.sample(w, len(w))) for w in some]
                    triple = triple | {key: f"{' '.join(some)} {triple[key]}" for key in ("input", "output")}
            caption, edit, output = triple.values()
            pairs.append((encode(make_prompt(caption)), encode(make_completion(edit, output))))
        return completion_loss(model, pairs)

    def loss_fn(step, rows):
        with args.autocast():
            return (captions_loss if step < first else triples_loss)(step), {}

    learns_from = hashlib.sha256(json.dumps([triples, str(args.base)]).encode()).hexdigest()
    record = run(args, model, loss_fn, learns_from=learns_from)
    dtype = torch.float16 if args.base else small_dtype
    round_weights(model, dtype)                                          # what is scored is what is stored
    record |= dict(triples=len(triples), verbatim=not readable, pretrain_steps=first,
                   scores=score_writer(writer, world, args), encoding=pack_encoding(encoding))
    save_gpt(model, args.out / "mini-gpt.safetensors", record, dtype=dtype)
    return {k: v for k, v in record.items() if k != "encoding"}


def score_writer(writer, world, args):
    """On new captions of each split: the share of completions that are edits, and how many of all the world's grammar finds
    right, wrong, or cannot read (`ip2p.world_reader.judge`)."""
    scores = {}
    for split in SPLITS:
        verdicts = Counter()
        for i in range(args.score_examples):
            caption = world.caption(args.seed + 5, i, split)[1]
            edit = writer.write(caption, args.seed)
            verdicts[judge(caption, *edit)[1] if edit else "no edit"] += 1
        share = {k: round(verdicts[k] / args.score_examples, 3) for k in ("right", "wrong", "unknown", "no edit")}
        scores[split] = dict(captions=args.score_examples, parsed=round(1 - share.pop("no edit"), 3), **share)
    return scores
