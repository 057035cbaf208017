"""CLIP models of open_clip, for judging pictures against words, and the paper's filter of drawn pairs (Sec. 3.1).

Of a pair drawn from a caption and an edited caption it takes four cosines of CLIP's features: of each picture with its
caption, of the change of the picture with the change of the caption (Gal et al., arXiv:2108.00946), and of the two
pictures. The published thresholds are for OpenAI's ViT-L/14; `calibrate` finds those of another CLIP.
"""
import logging
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensorfiles import read_state_dict, small_dtype, write_state_dict
from .text import TextConfig, Tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # OpenAI's, of pixels in [0, 1]
SCORES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")                   # as metadata.jsonl has them


# ---- models

def import_open_clip():
    """open_clip, imported where CLIP itself is needed: it takes longer than torch.

    Of torchvision it needs only Python code, but a torchvision built for another torch (a CUDA wheel beside a CPU torch)
    fails on import for want of its compiled operators. Declaring those two is enough to go on without them.
    """
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        import_open_clip.keep = library                      # its declarations last as long as it does
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import open_clip
    return open_clip


def normalize_pixels(pixels: Tensor, mean=MEAN, std=STD) -> Tensor:
    """Pixels in [-1, 1], (B, 3, H, W), to what CLIP's image tower expects."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std))
    return ((pixels + 1) / 2 - mean) / std


def build_clip(config: dict) -> torch.nn.Module:
    """An open_clip CLIP with fresh weights. config: embed_dim, vision_cfg and text_cfg, as in open_clip's model files."""
    return import_open_clip().CLIP(**config)


def save_clip(clip, config: dict, path, record: dict):
    """Write a CLIP as safetensors of `small_dtype`, with its configuration and training record in the metadata."""
    write_state_dict(path, clip.state_dict(), {"clip": config, **record}, small_dtype)


def load_clip(path, device=None) -> tuple[torch.nn.Module, dict]:
    """A CLIP that `save_clip` wrote, in float32 and eval mode, and its record. ValueError if the file is another kind."""
    tensors, record = read_state_dict(path)
    if "clip" not in record:
        raise ValueError(f"{path}: not a CLIP of this project (its metadata has no configuration)")
    clip = build_clip(record["clip"])
    clip.load_state_dict(tensors)
    return clip.float().eval().requires_grad_(False).to(device or "cpu"), record


def is_named(clip) -> bool:
    """Whether this is a name of open_clip's with weights, such as ViT-L-14:openai, and not a file."""
    return ":" in str(clip) and not Path(clip).exists()


def load_named_clip(name: str, device=None) -> tuple[torch.nn.Module, object]:
    """A CLIP by open_clip's name and weights, "ViT-L-14:openai" or "ViT-L-14-quickgelu:weights.safetensors", and its
    tokenizer. A tag that is not in open_clip's cache is downloaded. ValueError, in one line, if it cannot be had."""
    open_clip = import_open_clip()
    architecture, _, weights = name.partition(":")
    if architecture not in open_clip.list_models():
        raise ValueError(f"{name}: neither a CLIP file nor a name of open_clip's such as ViT-L-14:openai")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags and not Path(weights).is_file():
        raise ValueError(f"{name}: after the colon goes a file of weights, or one of {', '.join(tags)}")
    quick_gelu = (open_clip.get_pretrained_cfg(architecture, weights) or {}).get("quick_gelu", False)
    logging.disable()                            # of every attempt to reach the network: one line will do
    try:
        if is_torchscript(weights):
            clip = open_clip.load_openai_model(weights, precision="fp32", device=device or "cpu")
        else:
            clip = open_clip.create_model(architecture, weights, device=device or "cpu", force_quick_gelu=quick_gelu)
        return clip.eval().requires_grad_(False), open_clip.get_tokenizer(architecture)
    except Exception as error:                   # of the network, the hub's client, or a file of other weights
        reason = " ".join(str(error).split())[:200]
        quick = "-quickgelu" if quick_gelu and not architecture.endswith("-quickgelu") else ""       # a file does not say
        help = f"; download its weights and give {architecture}{quick}:FILE" if weights in tags else ""
        raise ValueError(f"{name}: cannot be loaded ({reason}){help}") from None
    finally:
        logging.disable(logging.NOTSET)


def is_torchscript(path) -> bool:
    """Whether a file is a TorchScript archive, as which OpenAI published its CLIPs."""
    return zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist())


# ---- similarities

class ClipSimilarity:
    """The paper's four similarities, with any CLIP.

    clip: a model with encode_image and encode_text. tokenizer: a list of texts to ids (B, M), cut to the model's length.
    """

    def __init__(self, clip, tokenizer, mean=MEAN, std=STD):
        self.clip, self.tokenizer, self.mean, self.std = clip, tokenizer, mean, std
        size = clip.visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.device = next(clip.parameters()).device

    @classmethod
    def load(cls, name, device=None) -> "ClipSimilarity":
        """By a CLIP file of this project, or by open_clip's name and weights (see `load_named_clip`)."""
        if is_named(name):
            clip, tokenizer = load_named_clip(str(name), device)
            preprocess = import_open_clip().get_model_preprocess_cfg(clip)
            return cls(clip, tokenizer, preprocess.get("mean", MEAN), preprocess.get("std", STD))
        clip, record = load_clip(name, device)
        return cls(clip, Tokenizer(TextConfig(**record["clip"]["text_cfg"], pad_with_end=False)))

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), float in [-1, 1], to unit vectors (B, D). ValueError for another range."""
        if not pixels.is_floating_point() or pixels.amin() < -1.001 or pixels.amax() > 1.001:
            raise ValueError(f"pixels must be floats in [-1, 1], got {pixels.dtype} in [{pixels.amin()}, {pixels.amax()}]")
        pixels = pixels.to(self.device, torch.float32)
        pixels = F.interpolate(pixels, self.size, mode="bicubic", align_corners=False)       # without antialiasing
        return F.normalize(self.clip.encode_image(normalize_pixels(pixels, self.mean, self.std)).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors (B, D)."""
        return F.normalize(self.clip.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=-1)

    def __call__(self, pixels_0: Tensor, pixels_1: Tensor, captions: list[str], edited_captions: list[str]) -> list[dict]:
        """The SCORES of each pair. pixels_0, pixels_1: (B, 3, H, W) in [-1, 1], before and after the edit."""
        image_0, image_1 = self.image_features(pixels_0), self.image_features(pixels_1)
        text_0, text_1 = self.text_features(captions), self.text_features(edited_captions)
        cosines = (F.cosine_similarity(image_0, text_0), F.cosine_similarity(image_1, text_1),
                   F.cosine_similarity(image_1 - image_0, text_1 - text_0), F.cosine_similarity(image_0, image_1))
        return [dict(zip(SCORES, row)) for row in torch.stack(cosines, 1).tolist()]


# ---- the filter

@dataclass(frozen=True)
class Thresholds:
    """What a pair must reach to be kept; the defaults are the paper's, for ViT-L/14."""
    caption: float = 0.2             # each picture with its caption
    direction: float = 0.2           # change of picture with change of caption
    image: float = 0.7               # the two pictures

    @classmethod
    def of(cls, clip) -> "Thresholds":
        """Those that go with a CLIP, by its name or file: stored in the file, else the paper's."""
        return cls() if is_named(clip) else cls(**read_state_dict(clip)[1].get("thresholds", {}))

    def passed_by(self, scores: dict) -> bool:
        """Whether a row reaches all of them. A score that is missing, or not a number, reaches none."""
        least = (self.caption, self.caption, self.direction, self.image)
        return all(isinstance(score := scores.get(name), (int, float)) and score >= value for name, value in zip(SCORES, least))


def keep(rows: list[dict], thresholds: Thresholds, most: int) -> list[dict]:
    """The rows that pass, at most `most`, those of greatest direction similarity first."""
    return sorted(filter(thresholds.passed_by, rows), key=lambda row: -row["clip_sim_dir"])[:most]


def calibrate(similarity: ClipSimilarity, world, count: int = 512) -> tuple[Thresholds, str]:
    """Thresholds for a CLIP of the miniature world, from pairs known to be right or wrong, and a table that explains them.

    Right are the world's true edits, `count` of them, with held-out scenes. Wrong are the same with another result: the
    source mirrored (nothing was edited), source and result exchanged (the opposite was done), another scene's result.
    The direction threshold is the one that best tells right from wrong (the greatest share of right pairs above it plus
    share of wrong pairs below it). The others are what 95% of the right pairs reach: wrong pairs may well reach them.
    """
    groups = {"right": [], "nothing edited": [], "opposite edit": [], "another scene": []}
    for start in range(0, count, 64):
        before, after, edits = world.pairs(0, start, min(64, count - start), "combinations")
        mirrored = world.render([replace(e.source, flip=not e.source.flip) for e in edits])
        texts = [e.caption for e in edits], [e.edited_caption for e in edits]
        pairs = (before, after), (before, mirrored), (after, before), (before, after.roll(1, 0))
        for rows, (x, y) in zip(groups.values(), pairs):
            rows += similarity(x, y, *texts)

    scores = {name: torch.tensor([[row[key] for key in SCORES] for row in rows]) for name, rows in groups.items()}
    right, wrong = scores["right"], torch.cat(list(scores.values())[1:])
    steps = torch.arange(-1, 1, 0.01)
    gain = [(right[:, 2] >= s).float().mean() + (wrong[:, 2] < s).float().mean() for s in steps]
    reached, best = right.quantile(0.05, 0), steps[int(torch.stack(gain).argmax())]
    caption, direction, image = (round(float(x), 2) for x in (reached[:2].min(), best, reached[3]))
    thresholds = Thresholds(caption, direction, image)

    lines = [f"{'5% / 50% / 95% of pairs':<23}" + "".join(f"{key:>24}" for key in SCORES) + "   pass"]
    for name, rows in groups.items():
        marks = scores[name].quantile(torch.tensor([0.05, 0.5, 0.95]), 0).T
        cells = "".join(f"{' / '.join(f'{x:.2f}' for x in column):>24}" for column in marks.tolist())
        lines.append(f"{name:<23}{cells}{sum(map(thresholds.passed_by, rows)) / len(rows):>7.0%}")
    return thresholds, "\n".join(lines)


def store_thresholds(path, thresholds: Thresholds):
    """Write thresholds into the metadata of a CLIP file of this project; its tensors stay as they are."""
    tensors, record = read_state_dict(path)
    write_state_dict(path, tensors, record | {"thresholds": asdict(thresholds)})
