"""Reads the miniature world's English back: a caption into its scene, an edit into what it changed and was told to change.

It stands in for a person who judges the language model's edits; what it cannot read, it does not guess at. It also puts
hand-written edits in other words of the world.
"""
import re
from dataclasses import replace

from .world import CONDITIONS, Scene, Thing, World
from .world_words import PLACES, SIZE_WORDS, STYLES, TIMELESS, WHEN, article, phrasing
from .world_words import caption as make_caption

# Ways of saying when that hand-written captions use and the world does not.
MORE_WHEN = {"day": ["in summer", "on a sunny day", "at noon", "at midday"], "dawn": ["at daybreak"], "sunset": ["at dusk"],
             "night": ["after dark"], "rain": ["in heavy rain"], "fog": ["in the mist"], "snow": ["in the snow"]}
MORE_WHERE = {"sea": ["over the ocean", "above the sea"], "desert": ["above the desert"],
              "beach": ["on a beach", "above the beach"]}
OPENINGS = r"^(an? )?(photo|picture|image) of |^(there is|there's|here we see) "
JOINTS = r" and | next to | beside | with | by "

# What an instruction may say of each fact, as regular expressions, after the things and places it names are taken out.
CONDITION_CUES = {
    "day": r"\bday\b|day(time|light)|noon|midday|bright|\blights\b", "sunset": r"sunset|evening|sundown|dusk|sun going down",
    "dawn": r"dawn|sunrise|day ?break|morning|first light|sun (is )?(just )?coming up", "night": r"night|dark|moon|stars",
    "rain": r"rain|pour|drizzl|wet|shower|storm", "snow": r"snow|flake|blizzard", "fog": r"fog|mist|haz[ey]|visib",
    "autumn": r"autumn|\bfall\b|october|november|leaves", "winter": r"winter|january|december|frost|snow"}
CLEARING = (r"\b(clear|sun\b|sunny|sunshine|dry|fair|summer|summertime|warm|july|june|defrost|thaw|day|blue sk|green again)"
            r"|\b(no|not|stop|end|remove|away|off|without|lift|melt|gone|rid|cut|burn|quit|let up|undo|lose|out|enough|take)"
            r"\b")
STYLE_CUES = {"pencil sketch": r"pencil|sketch|graphite|drawn|drawing|draw (it|this)",
              "oil painting": r"\boils?\b|oil paint", "watercolor": r"water ?colou?r", "pixel art": r"pixel|8-bit|video game",
              "black and white photo": r"black and white|monochrome|gr[ae]y ?scale"}
PLAIN_CUES = r"photo|real|undo|remove|\bno\b|lose|off|back|restore|colou?r|normal|ordinary|plain|enough|strip|away"
SIZE_CUES = {"tiny": r"tiny|small|little|shr[iu]nk|mini|reduce|minuscule|teeny",
             "huge": r"huge|giant|\bbig|gigantic|enormous|enlarge|grow|larger|magnif|scale up|blow|supersize|massive|monster"
                     r"|ten times"}
OWN_CUES = r"normal|usual|regular|natural|own|original|ordinary|everyday|real|full|back|remove|\bno\b|undo"
KEEPING = r"\b(only|just|keep|keeps|stay|stays|alone|solo|leave (?!$))\b"
TAKING = r"\b(remove|delete|erase|drop|take|lose|away|without|disappear|rid|no|gone|cut|hide|out|vanish|leaves?)\b"
PLACE_CUES = {                                       # the more particular first
    "snowfield": r"snowy field|snow field", "studio": r"studio|background",
    "underwater": r"underwater|sea ?floor|under the sea|bottom of the sea|ocean floor",
    "meadow": r"meadow|field", "forest": r"forest|woods", "mountains": r"mountain", "lake": r"\blake",
    "garden": r"garden", "farm": r"farm", "road": r"\broad", "beach": r"beach|seaside|\bsand|shore", "sea": r"\bsea\b|ocean",
    "desert": r"desert", "city": r"\bcity|\btown|street", "room": r"room|at home|indoors|inside", "table": r"\btable",
    "space": r"\bspace", "moon": r"the moon\b"}
GROUPS = {"bird": "land animal", "flying animal": "land animal", "boat": "vehicle", "aircraft": "vehicle", "object": "food"}

WORLD = World(subset="all")
NOUNS = sorted(WORLD.nouns, key=len, reverse=True)
NOUN = re.compile(r"\b(" + "|".join(map(re.escape, NOUNS)) + r")(?:e?s)?\b", re.IGNORECASE)
COLOR = re.compile(r"\b(" + "|".join(WORLD.colors) + r"|gray)\b(?<!black and white)(?! and white)", re.IGNORECASE)
SIZE_OF = {word: size for size, words in SIZE_WORDS.items() if size for word in words} | {"gigantic": "huge"}
THING = re.compile(rf"((an?|the) )?((?P<size>{'|'.join(SIZE_OF)}) )?((?P<color>{'|'.join(WORLD.colors)}) )?(?P<noun>.+)")
NOUN_OF = {noun.lower(): noun for noun in NOUNS}


def _phrases(table):
    """(words, key) of a table of phrases, the longest first."""
    return sorted(((words, key) for key, options in table.items() for words in options if words), key=lambda p: -len(p[0]))


WHENS = _phrases({key: WHEN[key] + MORE_WHEN.get(key, []) for key in WHEN})
WHERES = _phrases({place: [p for options in PLACES[place][0].values() for p in options] + MORE_WHERE.get(place, [])
                   for place in PLACES if place != "studio"})
STUDIO = re.compile(r"(?:on|against) a plain (\w+) background")


def read(caption: str) -> Scene | None:
    """The scene that a caption describes, without geometry; condition "" where it does not say when. None where there is a
    word that the world's grammar does not know, or the place is missing."""
    text = re.sub(r"\s+", " ", caption.strip().rstrip(".").lower())
    style = next((s for s in STYLES if s in text), "")
    if not style and text.endswith(", black and white"):
        style, text = "black and white photo", text + " photo"
    if style:
        text = re.sub(rf"(^(an? )?{style} of )|(,? (as |in )?(an? )?{style}$)", "", text)
    text = re.sub(OPENINGS, "", text)
    found = []
    for phrases in (WHENS, WHERES):
        said = [(words, key) for words, key in phrases if re.search(rf"\b{words}\b", text)]
        if not any(re.search(rf"\b{words}\b", text) for words, _ in WHERES if words != "in the snow"):
            said = [pair for pair in said if pair != ("in the snow", "snow")]          # then that is the place
        words, key = said[0] if said else ("", "")
        text = re.sub(rf"\b{words}\b", "|", text, count=1) if said else text
        found.append(key)
    condition, place = found
    color, studio = "", STUDIO.search(text)
    if not place and studio:
        place, color, text = "studio", studio[1], STUDIO.sub("|", text)
    text = re.sub(r"[\s,|]*\|[\s,|]*", " ", text).strip(" ,")      # what is left are the things
    text = re.sub(OPENINGS, "", text)
    things = []
    for part in re.split(JOINTS, text):
        match = THING.fullmatch(part)
        if not match or match["noun"] not in NOUN_OF:
            return None
        things.append(Thing(NOUN_OF[match["noun"]], "stand", .5, .5, 1., color=match["color"] or "",
                            size=SIZE_OF.get(match["size"], "")))
    return Scene(place, condition, 0, 0, False, tuple(things), (0, 0, 0), style, color) if place else None


def changes(a: Scene, b: Scene) -> list[tuple]:
    """What is different: (kind, old, new), of Things where one is concerned, else of Scenes; kind: one of ip2p.world.KINDS,
    or "other"."""
    found, x, y = [], a.things, b.things
    if len(x) == len(y):
        for old, new in zip(x, y):
            if old.noun != new.noun:
                found.append(("object", old, new))
            else:
                found += [(kind, old, new) for kind in ("color", "size") if getattr(old, kind) != getattr(new, kind)]
    elif len(y) == len(x) + 1 and any(y[:i] + y[i + 1:] == x for i in range(len(y))):
        found.append(("add", None, next(y[i] for i in reversed(range(len(y))) if y[:i] + y[i + 1:] == x)))
    elif len(x) == len(y) + 1 and any(x[:i] + x[i + 1:] == y for i in range(len(x))):
        found.append(("remove", next(x[i] for i in reversed(range(len(x))) if x[:i] + x[i + 1:] == y), None))
    else:
        found.append(("other", None, None))
    if (a.place, a.backdrop_color) != (b.place, b.backdrop_color):
        found.append(("place", a, b))
    timeless = a.place != b.place and {a.place, b.place} & set(TIMELESS) and {a.condition, b.condition} <= {"", "day"}
    if a.condition != b.condition and not timeless:
        which = b.condition if b.condition not in ("", "day") else a.condition
        found.append((next((kind for kind in ("weather", "season") if which in CONDITIONS[kind][1:]), "time"), a, b))
    if a.style != b.style:
        found.append(("style", a, b))
    return found


def judge(caption: str, instruction: str, edited: str) -> tuple[str, str]:
    """(kind of edit, "right" | "wrong" | "unknown"): whether the edited caption is the caption with exactly the instruction
    applied. Right: every difference is asked for, and the instruction speaks of nothing else. Unknown: the grammar
    cannot read one of the three."""
    a, b = read(caption), read(edited)
    if a is None or b is None:
        return "unread", "unknown"
    found, text = changes(a, b), instruction.lower()
    if not found:
        return "none", "wrong"
    nouns, text = {NOUN_OF[n.lower()] for n in NOUN.findall(text)}, NOUN.sub(" ", text)
    places = set()
    for place, cue in PLACE_CUES.items():
        if re.search(cue, text):
            places.add(place)
            text = re.sub(cue, " ", text)
    colors = set(COLOR.findall(text))
    styles = {style for style, cue in STYLE_CUES.items() if re.search(cue, text)}
    if "watercolor" in styles:
        text = re.sub(STYLE_CUES["watercolor"], " ", text)
    conditions = {c for c, cue in CONDITION_CUES.items() if re.search(cue, text)}
    if "winter" in (a.condition, b.condition):
        conditions -= {"snow"}                                  # "a snowy winter"
    elif "snow" in (a.condition, b.condition):
        conditions -= {"winter"}
    sizes = {size for size, cue in SIZE_CUES.items() if re.search(cue, text)}
    both = a.things + b.things
    said = lambda thing: thing.noun in nouns or bool(re.search(rf"\b{thing.noun.split()[-1].lower()}", instruction.lower()))
    alone = len(a.things) == 1

    def verdict(kind, old, new):
        if kind in ("object", "add"):
            extra = new.color and new.color not in colors | {old.color if old else ""}
            return "unknown" if not nouns else "right" if said(new) and not extra else "wrong"
        if kind == "remove":
            rest = any(said(t) for t in b.things)
            if re.search(KEEPING, text) and rest:
                return "right"
            if said(old):
                return "right" if not re.search(KEEPING, text) or re.search(TAKING, text) else "wrong"
            return "wrong" if rest else "unknown"
        if kind in ("color", "size"):
            value, mentioned = getattr(new, kind), colors if kind == "color" else sizes
            if not said(new) and (nouns or not alone):
                return "wrong" if nouns else "unknown"
            if value:
                return "right" if value in mentioned else "wrong" if mentioned else "unknown"
            return "right" if re.search(OWN_CUES, text) else "unknown"
        if kind == "place":
            others = places - {a.place}
            if b.place == a.place == "studio":
                return "right" if b.backdrop_color in colors else "wrong"
            snowed = b.place == "snowfield" and re.search(r"in the snow\b", text)
            return "right" if b.place in places or snowed else "wrong" if others else "unknown"
        if kind == "style":
            if b.style:
                return "right" if b.style in styles else "wrong" if styles else "unknown"
            return "right" if re.search(PLAIN_CUES, text) else "unknown"
        if kind in CONDITIONS:
            if conditions - {a.condition, b.condition, "day"}:
                return "wrong"
            asked = b.condition in conditions or b.condition in ("", "day") and re.search(CLEARING, text)
            return "right" if asked else "wrong" if conditions - {a.condition} else "unknown"
        return "wrong"

    kinds = {kind for kind, _, _ in found}
    foreign = nouns - {t.noun for t in both} or places - {a.place, b.place, "studio"} or styles - {a.style, b.style} \
        or colors - {t.color for t in both} - {a.backdrop_color, b.backdrop_color} \
        or kinds & {"color", "object", "add", "remove", "place"} and conditions - {a.condition, b.condition, "day"}
    verdicts = {verdict(*change) for change in found}
    if "wrong" in verdicts or "right" in verdicts and ("unknown" in verdicts or foreign):     # more was done, or asked for
        return "+".join(sorted(kinds)), "wrong"
    return "+".join(sorted(kinds)), verdicts.pop()


def relexicalize(triple: dict, rng, world: World) -> dict | None:
    """A hand-written triple in other words of the world: the same instruction about other things, captions to match.
    None where the grammar cannot read the triple, or the dice do not fit.

    Things become others of their kind and colours other colours, in all three texts alike; a place to go to, if the
    instruction names it as the world does, another place. What the instruction neither names nor changes (the place,
    the time, colours) is drawn anew, and the captions are put in the world's phrasings. Nothing held out of training
    is made. rng: a random.Random.
    """
    if judge(*triple.values())[1] != "right":
        return None
    a, b, edit = read(triple["input"]), read(triple["output"]), triple["edit"]
    found = changes(a, b)
    kinds = {kind for kind, _, _ in found}
    # Things: those that the edit concerns must be named word for word, or the triple keeps its things.
    named = {NOUN_OF.get(m[0].lower()) for m in NOUN.finditer(edit)}
    nouns = list(dict.fromkeys(t.noun for t in a.things + b.things))
    touched = {t.noun for _, *pair in found for t in pair if isinstance(t, Thing)}
    hinted = {n for n in nouns if n not in named and re.search(rf"\b{n.split()[-1].lower()}", edit.lower())}
    if touched <= named and not hinted:
        of_kind = lambda noun: GROUPS.get(WORLD.sprites[noun]["category"], WORLD.sprites[noun]["category"])
        options = {n: [m for m in world.nouns if of_kind(m) == of_kind(n)] for n in nouns}
        renamed = {n: rng.choice(options[n]) for n in nouns}
    else:
        renamed = {n: n for n in nouns}
    if len(set(renamed.values())) < len(nouns):
        return None
    # Colours: one permutation for all, or as they are where the edit says one in another word ("redden").
    recolored = dict(zip(world.colors, rng.sample(list(world.colors), len(world.colors))))
    if any(kind == "color" and new.color and new.color not in COLOR.findall(edit.lower()) for kind, _, new in found):
        recolored = {color: color for color in world.colors}
    painted = {n: rng.choice(list(world.colors)) for n in nouns if n not in touched and world.sprites[renamed[n]]["recolor"]
               and rng.random() < .25}
    # Surroundings.
    places = {place for place, cue in PLACE_CUES.items() if re.search(cue, edit.lower())}
    where, when = {a.place: a.place, b.place: b.place}, {c: c or "day" for c in (a.condition, b.condition)}
    homes = [p for p in world.places if all(renamed[n] in world.natives[p] for n in nouns)]
    if "place" in kinds and homes:
        goal = rng.choice(homes)
        there, at = PLACES[b.place][1], [w for w, place in WHERES if place == b.place]
        modes = {world.sprites[renamed[t.noun]]["places"][goal] for t in b.things}
        phrases = PLACES[goal][0].get(modes.pop() if len(modes) == 1 else "mixed") or next(iter(PLACES[goal][0].values()))
        for old, new in [(there, PLACES[goal][1])] + [(w, rng.choice(phrases)) for w in at]:
            if re.search(rf"\b{old}\b", edit):
                edit, where[b.place] = re.sub(rf"\b{old}\b", new, edit), goal
                break
    if a.place not in places and homes:
        where[a.place] = rng.choice(homes)
    if not kinds & set(CONDITIONS) and not any(re.search(cue, edit.lower()) for cue in CONDITION_CUES.values()):
        possible = [c for c in world.places.get(where[a.place], ["day"]) if c in world.places.get(where[b.place], ["day"])]
        when = dict.fromkeys(when, rng.choice(possible) if possible and rng.random() < .75 else "day")
    style = rng.choice(list(STYLES)) if "style" not in kinds and not a.style and rng.random() < .08 else ""

    def scene(old):
        place = where[old.place]
        things = [replace(t, noun=renamed[t.noun], mode=world.sprites[renamed[t.noun]]["places"].get(place, "stand"),
                          color=recolored[t.color] if t.color else painted.get(t.noun, "")) for t in old.things]
        return replace(old, place=place, condition=when[old.condition], things=tuple(things), style=old.style or style,
                       backdrop_color=recolored.get(old.backdrop_color, ""))

    fresh = set()
    def swap(table):
        def new(match):
            word = table.get(NOUN_OF.get(match[0].lower(), match[0].lower()), match[0])
            fresh.add(word.split()[0])
            return word
        return new
    edit = COLOR.sub(swap(recolored), NOUN.sub(swap(renamed), edit))
    edit = re.sub(r"\b(an?) (\w+)", lambda m: f"{article(m[2])} {m[2]}" if m[2] in fresh else m[0], edit)
    source, target, words = scene(a), scene(b), phrasing(rng)._replace(drop_color=False, drop_when=False)
    if world.holds_out(source) or world.holds_out(target):
        return None
    new = dict(input=make_caption(source, words), edit=edit, output=make_caption(target, words))
    return new if judge(*new.values())[1] == "right" else None
