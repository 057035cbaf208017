"""The miniature world's English: captions of scenes, and instructions for edits.

A caption is a scene put through a `Phrasing`, a set of choices drawn once. Captioning two scenes with one phrasing
gives two captions that differ only in what the scenes differ in. Each table of templates has two halves: those used
in training, and those kept for the split "phrasings".
"""
from typing import NamedTuple

# Places: phrases by how the things are there (the first also for mixed company), and the words after "move it to".
PLACES = {
    "meadow": ({"stand": ["in a meadow", "in a field", "in the meadow"], "fly": ["over a meadow", "over a field"]},
               "a meadow"),
    "forest": ({"stand": ["in the forest", "in the woods", "in a forest"]}, "the forest"),
    "mountains": ({"stand": ["in the mountains"], "fly": ["over the mountains", "in the mountains"]}, "the mountains"),
    "lake": ({"stand": ["by a lake"], "float": ["on a lake"], "fly": ["over a lake"]}, "a lake"),
    "garden": ({"stand": ["in a garden", "in the garden"]}, "a garden"),
    "farm": ({"stand": ["on a farm", "at a farm"], "fly": ["over a farm"]}, "a farm"),
    "road": ({"stand": ["on a country road", "on a road"], "fly": ["over a country road"]}, "a country road"),
    "beach": ({"stand": ["on the beach", "on a sandy beach", "at the beach"], "fly": ["over the beach"]}, "the beach"),
    "sea": ({"mixed": ["at sea"], "float": ["on the sea", "on the ocean", "at sea"],
             "swim": ["in the sea", "in the ocean"], "fly": ["over the sea", "above the ocean"]}, "the sea"),
    "desert": ({"stand": ["in the desert", "in a desert"], "fly": ["over the desert"]}, "the desert"),
    "snowfield": ({"stand": ["in a snowy field", "in the snow"], "fly": ["over a snowy field"]}, "a snowy field"),
    "city": ({"stand": ["in the city", "on a city street", "in town"], "fly": ["over the city", "in the city"]},
             "the city"),
    "underwater": ({"swim": ["underwater", "under the sea"], "stand": ["on the sea floor", "underwater"]},
                   "the bottom of the sea"),
    "room": ({"stand": ["in a living room", "at home", "in a room"]}, "a living room"),
    "table": ({"stand": ["on a table"]}, "a table"),
    "space": ({"fly": ["in outer space", "in space"]}, "outer space"),
    "moon": ({"stand": ["on the moon"], "fly": ["over the moon"]}, "the moon"),
    "studio": ({"stand": ["on a plain {} background", "against a plain {} background"]},
               "a studio with a plain {} background"),
}
TIMELESS = ("space", "moon", "studio")              # places with one condition: a caption never says when

WHEN = {
    "day": ["", "", "", "", "during the day", "in daylight"],
    "sunset": ["at sunset", "in the evening", "at sundown"],
    "dawn": ["at dawn", "at sunrise", "in the early morning"],
    "night": ["at night", "at night", "late at night"],
    "rain": ["in the rain", "on a rainy day", "while it rains"],
    "snow": ["in falling snow", "while it snows", "during a snowfall"],
    "fog": ["in the fog", "on a foggy day", "in thick fog"],
    "autumn": ["in autumn", "in autumn", "on an autumn day"],
    "winter": ["in winter", "in winter", "on a winter day"],
}
SIZE_WORDS = {"": ["normal"], "tiny": ["tiny", "small", "little"], "huge": ["huge", "giant", "big"]}
STYLES = {"pencil sketch": "a pencil sketch", "oil painting": "an oil painting", "watercolor": "a watercolor",
          "pixel art": "pixel art", "black and white photo": "a black and white photo"}
STYLE_ENDINGS = [", {}", ", {}", " as {a}", ", as {a}"]
JOINS = ["{} and {}", "{} and {}", "{} and {}", "{} next to {}", "{} beside {}", "{} with {}"]
ENDINGS = [""] * 8 + ["."]

# Captions: what stands before the sentence (a style takes its place: "a pencil sketch of "), and the sentence.
CAPTIONS = (
    [("", "{a} {place} {when}"), ("", "{a} {place} {when}"), ("", "{a} {place} {when}"), ("", "{when}, {a} {place}"),
     ("", "{a} {place}, {when}"), ("", "{a}, {place}, {when}"), ("", "{place} {when}, {a}"),
     ("", "there is {a} {place} {when}"), ("a photo of ", "{a} {place} {when}"), ("photo of ", "{a} {place} {when}"),
     ("a picture of ", "{a} {place} {when}")],
    [("an image of ", "{a} {place} {when}"), ("", "here we see {a} {place} {when}"),
     ("", "{place}, {when}, there is {a}")],
)

# Instructions. {the} is the thing changed, {new} what comes, {it} the whole scene or its things.
INSTRUCTIONS = {
    "object": (
        ["turn {the} into {new}", "replace {the} with {new}", "swap {the} for {new}", "change {the} to {new}",
         "change {the} into {new}", "make {the} {new}", "{new} instead of {the}", "what if {the} were {new}?",
         "have {new} instead of {the}", "it should be {new}, not {the}", "let {new} take the place of {the}",
         "put {new} in place of {the}", "use {new} in place of {the}", "substitute {new} for {the}",
         "trade {the} for {new}", "switch {the} with {new}", "{the} becomes {new}", "{the} should become {new}",
         "convert {the} into {new}", "could {the} be {new}?", "I would rather see {new} than {the}",
         "take {the} out and put {new} in", "{the} turns into {new}", "I want {new} instead of {the}",
         "give me {new} instead of {the}", "{new}, not {the}", "{new} rather than {the}", "remake {the} as {new}",
         "redraw {the} as {new}", "let {the} become {new}", "{the} is now {new}", "what if {new} stood in for {the}?",
         "instead of {the}, show {new}", "instead of {the} there should be {new}", "can you turn {the} into {new}?",
         "{the} out, {new} in", "pretend that {the} is {new}", "{the} should be {new}",
         "please replace {the} with {new}", "let {new} stand in for {the}"],
        ["exchange {the} for {new}", "put {new} where {the} is", "transform {the} into {new}"]),
    "time": (
        ["make it {time}", "make it {time}", "turn it into {time}", "change it to {time}",
         "change the time of day to {time}", "as if {at}", "show it {at}", "set it {at}", "{at}",
         "what if it were {time}?", "it should be {time}", "turn {old} into {time}", "have it be {time}",
         "transform the scene to {time}", "could it be {time}?", "I want to see it {at}", "use the light of {time}"],
        ["let it be {time}", "switch to {time}", "what would it look like {at}?"]),
    "weather": (
        ["make it {make}", "make it {adj}", "let it {verb}", "have it {verb}", "add {noun}", "add some {noun}",
         "make it a {adj} day", "make the weather {adj}", "change the weather to {noun}", "what if it were {ing}?",
         "turn it into a {adj} day", "it should be {ing}", "bring some {noun}", "there should be {noun}",
         "as if it were {ing}", "could it be {ing}?", "I want {noun}", "with {adj} weather"],
        ["bring in the {noun}", "give it {adj} weather", "show it on a {adj} day"]),
    "weather undo": (
        ["{stop} the {was}", "remove the {was}", "make the weather clear", "clear the weather",
         "take away the {was}", "make it a clear day", "turn it into a sunny day", "have the {was} stop",
         "make it sunny", "no {was}", "without the {was}", "it should not have any {was}", "lose the {was}",
         "exchange the {was} for a clear sky", "let the sun come out", "the {was} should be gone"],
        ["no more {was}", "get rid of the {was}"]),
    "season": (
        ["make it {season}", "turn it into {season}", "change it to {season}", "change the season to {season}",
         "as if in {season}", "show it in {season}", "set it in {season}", "what if it were {season}?",
         "it should be {season}", "have it be {season}", "transform the scene to {season}", "could it be {season}?",
         "I want to see it in {season}", "give it the colors of {season}"],
        ["let it be {season}", "switch the season to {season}", "how would it look in {season}?"]),
    "place": (
        ["move {it} to {there}", "put {it} {at}", "take {it} to {there}", "what if {it} were {at}?",
         "change the background to {there}", "set the scene {at}", "have {it} be {at}", "show {it} {at}",
         "change the scenery to {there}", "{it} should be {at}", "change the place to {there}", "carry {it} to {there}",
         "place {it} {at}", "let {it} stay {at}", "use {there} as the background", "replace the background with {there}",
         "could {it} be {at}?", "I want to see {it} {at}"],
        ["send {it} to {there}", "imagine {it} {at}", "bring {it} to {there}"]),
    "color": (
        ["make {the} {color}", "make {the} {color}", "paint {the} {color}", "turn {the} {color}",
         "color {the} {color}", "change {the} to {color}", "change the color of {the} to {color}",
         "have {the} be {color}", "what if {the} were {color}?", "{the} should be {color}", "tint {the} {color}",
         "could {the} be {color}?", "show {the} in {color}", "put {color} paint on {the}", "{the} becomes {color}",
         "use {color} for {the}", "I want {the} in {color}", "give {the} a {color} color",
         "give {the} a coat of {color}", "cover {the} in {color}", "coat {the} with {color} paint",
         "recolor {the} in {color}", "{the} in {color}", "{color} for {the}", "{the} is now {color}",
         "{the} turns {color}", "I would like {the} {color}", "spray {the} {color}", "stain {the} {color}",
         "what if {the} turned {color}?", "fill {the} with {color}", "pretend that {the} is {color}",
         "can you make {the} {color}?", "please paint {the} {color}", "redo {the} in {color}"],
        ["let {the} be {color}", "dye {the} {color}", "switch the color of {the} to {color}"]),
    "color undo": (
        ["make {the} its usual color", "give {the} its natural color", "remove the {was} color from {the}",
         "take the {was} paint off {the}", "{the} should have its usual color", "{the} should not be {was}",
         "show {the} in its own color", "wash the {was} off {the}", "clean the {was} off {the}",
         "{the} in its own color", "undo the {was} color of {the}", "let {the} have its usual color",
         "{the} should lose its {was} color", "I want {the} in its natural color"],
        ["return {the} to its own color", "no more {was} paint on {the}"]),
    "add": (
        ["add {new}", "add {new}", "add {new} next to {the}", "put {new} next to {the}", "put {new} beside {the}",
         "place {new} beside {the}", "include {new}", "insert {new}", "have {new} in it", "there should be {new} too",
         "let {new} join {the}", "draw {new} too", "draw {new} into it", "bring {new} into the picture",
         "drop {new} in", "show {new} close to {the}", "I want to see {new} too", "let {new} appear",
         "give {the} {new} for company", "could there be {new} as well?", "set {new} by {the}", "now with {new}",
         "also draw {new}", "also show {new}", "add {new} to it", "add {new} to the picture", "add {new} by {the}",
         "there is also {new}", "with {new} too", "{new} as well", "{new} next to {the}",
         "I would like {new} as well", "give me {new} too", "can you add {new}?", "what if there were {new} too?",
         "could {new} be in it too?", "pair {the} with {new}", "put {new} in the picture",
         "let {the} have {new} beside it", "please add {new}"],
        ["bring in {new}", "let there be {new}", "draw {new} near {the}"]),
    "remove": (
        ["remove {the}", "remove {the}", "take {the} away", "take away {the}", "delete {the}", "get rid of {the}",
         "erase {the}", "make {the} disappear", "have {the} leave", "without {the}", "take {the} out",
         "cut {the} from the picture", "there should be no sign of {the}", "leave {the} out", "lose {the}",
         "no {the}", "{the} should be gone", "{the} should go away", "let {the} vanish", "I do not want {the} in it",
         "clear {the} away", "wipe out {the}", "take {the} off", "strip {the} out", "rub {the} out",
         "eliminate {the}", "hide {the}", "throw {the} out", "scrap {the}", "omit {the}", "exclude {the}",
         "I want {the} gone", "I want it without {the}", "the picture without {the}", "show it without {the}",
         "draw it without {the}", "{the} is gone", "{the} has left", "{the} leaves", "{the} must go",
         "what if {the} were gone?", "could you remove {the}?", "please remove {the}", "do without {the}",
         "paint over {the}", "pull {the} out of it"],
        ["cut out {the}", "drop {the}", "{the} should not be there"]),
    "size": (
        ["make {the} {size}", "make {the} {size}", "have {the} be {size}", "turn {the} into {one}", "{scale} {the}",
         "make {the} much {more}", "what if {the} were {size}?", "{the} should be {size}", "change {the} to {one}",
         "{the} should be much {more}", "could {the} be {size}?", "I want {the} {more}", "draw {the} {more}",
         "{the} becomes {size}", "replace {the} with {one}"],
        ["let {the} be {size}", "show {the} as {one}", "{the}, but {size}"]),
    "size undo": (
        ["make {the} normal sized", "give {the} its normal size", "make {the} its usual size",
         "{the} should be normal sized", "draw {the} at its usual size", "{the} should have its own size",
         "change {the} back to its normal size", "{the} at its usual size", "have {the} be its usual size",
         "undo the size of {the}", "let {the} have its own size"],
        ["return {the} to its own size", "let {the} be its normal size"]),
    "style": (
        ["make it {a}", "turn it into {a}", "change it to {a}", "as {a}", "convert it to {a}", "redo it as {a}",
         "what if it were {a}?", "it should be {a}", "make it look like {a}", "show it as {a}", "in the style of {a}",
         "draw it as {a}", "paint it as {a}", "could it be {a}?", "I want to see it as {a}", "switch to {a}",
         "make {a} of it", "give me {a}", "I would like {a}", "turn the picture into {a}", "make the picture {a}",
         "change the picture to {a}", "have it be {a}", "let it become {a}", "let it look like {a}",
         "as if it were {a}", "redraw it as {a}", "remake it as {a}", "change the style to {a}",
         "could you make it {a}?", "it becomes {a}", "it should look like {a}", "pretend that it is {a}",
         "use the style of {a}", "please make it {a}"],
        ["render it as {a}", "transform it into {a}", "give it the look of {a}"]),
    "style undo": (
        ["turn it into a normal photo", "make it a normal photo", "make it a photo again",
         "change it to a plain photo", "undo the {was} effect", "remove the {was} effect", "make it look real",
         "no {was} effect", "without the {was} effect", "lose the {was} effect", "it should not be {was}",
         "back to a photo", "I want a normal photo", "give me the real photo", "take the {was} effect away",
         "turn off the {was} effect", "as a photo", "as a normal photo", "show it as a photo", "it should be a photo",
         "it should look real", "let it be a real photo", "there should be no {was} effect",
         "clear the {was} effect away"],
        ["bring back the photo", "no more {was} effect"]),
}
ALONE = {                                           # where there is one thing, "it" is clear
    "object": ["make it {new}", "turn it into {new}"],
    "color": ["make it {color}", "paint it {color}"],
    "size": ["make it {size}", "make it much {more}"],
}

TIMES = {"day": ["day", "daytime"], "sunset": ["sunset", "evening"], "dawn": ["dawn", "sunrise"],
         "night": ["night", "night", "nighttime"]}
AT_TIMES = {"day": ["during the day", "in daylight"], **{time: WHEN[time] for time in ("sunset", "dawn", "night")}}
WEATHERS = {"rain": dict(make="rain", verb="rain", adj="rainy", ing="raining", noun="rain"),
            "snow": dict(make="snow", verb="snow", adj="snowy", ing="snowing", noun="snow"),
            "fog": dict(make="foggy", verb="be foggy", adj="foggy", ing="foggy", noun="fog")}
SEASONS = {"day": ["summer"], "autumn": ["autumn", "autumn", "fall"], "winter": ["winter"]}


class Phrasing(NamedTuple):
    """Choices of words for a caption; the floats in [0, 1) each pick from whatever list the scene calls for."""
    template: tuple
    place: float
    when: float
    size: float
    style: float
    join: str
    ending: str
    capital: bool
    drop_color: bool
    drop_when: bool


def phrasing(rng, held_out=False, mention=""):
    """A `Phrasing` drawn with `rng`; mention: "color" or "when" must not be dropped.

    held_out: take the templates kept from training.
    """
    return Phrasing(template=rng.choice(CAPTIONS[held_out]), place=rng.random(), when=rng.random(), size=rng.random(),
                    style=rng.random(), join=rng.choice(JOINS), ending=rng.choice(ENDINGS), capital=rng.random() < .1,
                    drop_color=rng.random() < .06 and mention != "color",
                    drop_when=rng.random() < .06 and mention != "when")


def pick(options, u):
    return options[int(u * len(options))]


def article(words):
    """"a" or "an" for the words that follow."""
    return "an" if words[0] in "aeiou" and not words.startswith("unicorn") or words.startswith("hour") else "a"


def describe(thing, u=0., color=True):
    """Adjectives and noun: "tiny red fox"."""
    size = pick(SIZE_WORDS[thing.size], u) + " " if thing.size else ""
    return size + (thing.color + " " if thing.color and color else "") + thing.noun


def named(thing, u=0., color=True):
    words = describe(thing, u, color)
    return f"{article(words)} {words}"


def whereabouts(scene, u):
    """"in a meadow", "over the sea": the place as the scene's things are in it."""
    phrases, modes = PLACES[scene.place][0], {thing.mode for thing in scene.things}
    mode = "float" if "float" in modes else modes.pop() if len(modes) == 1 else "mixed"
    return pick(phrases.get(mode) or next(iter(phrases.values())), u).format(scene.backdrop_color)


def without_when(sentence):
    for part in (", {when}", " {when}", "{when}, "):
        sentence = sentence.replace(part, "")
    return sentence


def finish(text, capital, ending):
    text = text[0].upper() + text[1:] if capital else text
    return text if text.endswith("?") else text + ending


def caption(scene, phrasing):
    """The scene in words, as a `Phrasing` puts it."""
    things = [named(thing, phrasing.size, not phrasing.drop_color) for thing in scene.things]
    when = "" if scene.place in TIMELESS or phrasing.drop_when else pick(WHEN[scene.condition], phrasing.when)
    opening, sentence = phrasing.template
    text = (sentence if when else without_when(sentence)).format(
        a=phrasing.join.format(*things) if len(things) > 1 else things[0],
        place=whereabouts(scene, phrasing.place), when=when)
    if not scene.style:
        text = opening + text
    elif opening:
        text = f"{STYLES[scene.style]} of {text}"
    else:
        text += pick(STYLE_ENDINGS, phrasing.style).format(scene.style, a=STYLES[scene.style])
    return finish(text, phrasing.capital, phrasing.ending)


def instruction(rng, kind, source, target, which, held_out=False):
    """An instruction that turns `source` into `target`; which: the index of the thing concerned, if there is one."""
    old = source.things[0 if kind == "add" else which]
    new = target.things[min(which, len(target.things) - 1)]
    alone, key = len(source.things) == 1, kind
    slots = {"the": "the " + (describe(old, rng.random()) if rng.random() < .3 else old.noun)}
    if kind in ("object", "add"):
        slots["new"] = named(new, rng.random())
    elif kind == "time":
        slots = dict(time=rng.choice(TIMES[target.condition]), at=rng.choice(AT_TIMES[target.condition]),
                     old=TIMES[source.condition][0])
    elif kind == "weather" and target.condition == "day":
        key = "weather undo"
        slots = dict(was=source.condition, stop="clear" if source.condition == "fog" else "stop")
    elif kind == "weather":
        slots = WEATHERS[target.condition]
    elif kind == "season":
        slots = dict(season=rng.choice(SEASONS[target.condition]))
    elif kind == "place":
        slots = dict(it="it" if rng.random() < .6 else slots["the"] if alone else "everything",
                     at=whereabouts(target, rng.random()), there=PLACES[target.place][1].format(target.backdrop_color))
    elif kind == "color":
        key = "color" if new.color else "color undo"
        slots.update(color=new.color, was=old.color)
    elif kind == "size":
        key, word = "size" if new.size else "size undo", rng.choice(SIZE_WORDS[new.size])
        slots.update(size=word, one=f"{article(word)} {word} {new.noun}",
                     more="bigger" if new.size == "huge" else "smaller",
                     scale="enlarge" if new.size == "huge" else "shrink")
    elif kind == "style" and target.style:
        slots = dict(a=STYLES[target.style])
    elif kind == "style":
        key, slots = "style undo", dict(was=source.style)
    options = INSTRUCTIONS[key][held_out]
    if alone and not held_out and key in ALONE and rng.random() < .15:
        options = ALONE[key]
    return finish(rng.choice(options).format(**slots), rng.random() < .1, rng.choice(ENDINGS))
