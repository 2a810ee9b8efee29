"""Word problems of 1 to 5 steps: there is a number of things, events change it, a question is asked.

Every sentence comes from a table below. Slots: {A} and {B} people ({his}: A's), {x} the things, {n} an
amount, {k} a small factor, {m} the things in one pack. A worked step repeats its event and adds the equation:
"Ida gives Tom 7 marbles: 8 + 7 = 15 marbles.", so that words and operands can be copied and only the result
must be computed.
"""

import operator
import random
from dataclasses import dataclass, field
from typing import NamedTuple

LEVELS = range(1, 6)
MAX_AMOUNT = 99
HE = "Ali Ben Hugo Ivan Ken Leo Max Noah Omar Tom".split()
SHE = "Ana Eva Ida Jane Lily Maya Nina Rosa Sara Zoe".split()
COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


class Scene(NamedTuple):
    """A setting. Where a field holds several sentences, one of them is drawn."""

    things: str
    start: str
    gain: str  # events of one step
    lose: str
    pack: str  # an event of two steps
    last: dict[str, tuple[str, str, str]]  # events with a question of their own, and the unit of its answer
    ask: str = "How many {x} does {A} have now?; How many {x} are there in the end?"


FRIENDS = {
    "times": ("{B} has {k} times as many {x} as {A}", "How many {x} does {B} have?", "{x}"),
    "plus": ("{B} has {n} more {x} than {A}", "How many {x} does {B} have?", "{x}"),
    "minus": ("{B} has {n} fewer {x} than {A}", "How many {x} does {B} have?", "{x}"),
    "sum": ("{B} has {n} {x} too", "How many {x} do {A} and {B} have together?", "{x}"),
}
EACH_CHILD = "How many {x} does each child get?"
SHARING = {
    "share": ("{A} divides all of {his} {x} equally among {k} children", EACH_CHILD, "{x}"),
    "fill": ("{A} puts all of {his} {x} into bags of {k}", "How many bags does {A} fill?", "bags"),
    "price": ("{A} sells all of {his} {x} for {k} dollars each", "How many dollars does {A} get?", "dollars"),
}
BUSES = {
    "price": ("All {x} pay {k} dollars each", "How many dollars do they pay together?", "dollars"),
    "fill": ("All {x} form teams of {k}", "How many teams are there?", "teams"),
    "plus": ("Another bus has {n} more {x} than this one", "How many {x} does it have?", "{x}"),
    "minus": ("Another bus has {n} fewer {x} than this one", "How many {x} does it have?", "{x}"),
}
PENS = {"fill": ("{A} spends it all on pens for {k} dollars each", "How many pens does {A} buy?", "pens")}

MARBLES = Scene(
    things="badges balloons beads buttons cards coins crayons marbles pencils stamps stickers",
    start="{A} has {n} {x}; {A} owns {n} {x}; {A} keeps {n} {x} in a box",
    gain="{A} finds {n} more {x}; {B} gives {A} {n} {x}; Then {A} buys {n} more {x}; {A} wins {n} {x}",
    lose="{A} loses {n} {x}; {A} gives {n} {x} to {B}; Then {A} sells {n} {x}; {B} takes {n} of the {x}",
    pack="{A} buys {k} bags with {m} {x} each",
    last=FRIENDS | SHARING,
)
CAKES = Scene(
    things="buns cakes cookies muffins pancakes pies pretzels rolls waffles",
    start="{A} bakes {n} {x}; {A} makes {n} {x} for a party; On Monday {A} bakes {n} {x}",
    gain="Then {A} bakes {n} more {x}; {B} brings {A} {n} {x}; {A} makes another {n} {x}",
    lose="{A} sells {n} {x}; The guests eat {n} of the {x}; {A} gives {n} {x} to {B}; {n} of the {x} burn",
    pack="{A} fills {k} trays with {m} new {x} each",
    last=FRIENDS | SHARING,
)
FRUIT = Scene(
    things="apples carrots cherries lemons onions peaches pears plums potatoes tomatoes",
    start="{A} picks {n} {x}; {A} harvests {n} {x} from the garden; In the morning {A} gathers {n} {x}",
    gain="{A} picks {n} more {x}; {B} gives {A} {n} {x}; Then {A} gathers another {n} {x}",
    lose="{A} cooks {n} of the {x}; {A} throws away {n} bad {x}; {A} gives {n} {x} to {B}",
    pack="{A} gets {k} baskets with {m} {x} each",
    last=FRIENDS | SHARING,
)
MONEY = Scene(
    things="dollars",
    start="{A} has {n} dollars; {A} earns {n} dollars; There are {n} dollars in {A}'s purse",
    gain="{A} finds {n} dollars; {B} gives {A} {n} dollars; {A} gets {n} dollars for cleaning a car",
    lose="{A} spends {n} dollars; {A} pays {n} dollars for a book; {A} gives {n} dollars to {B}",
    pack="{A} works {k} hours for {m} dollars an hour",
    last=FRIENDS | PENS,
)
BUS = Scene(
    things="children passengers players students tourists workers",
    start="There are {n} {x} on a bus; A bus leaves with {n} {x}; {A} drives a bus with {n} {x}",
    gain="Then {n} more {x} get on; At the park {n} {x} get on; At the next stop {n} {x} get on",
    lose="Then {n} {x} get off; At the bridge {n} {x} get off; At the next stop {n} {x} leave the bus",
    pack="At the station {k} groups of {m} {x} get on",
    last=BUSES,
    ask="How many {x} are on the bus now?; How many {x} are there in the end?",
)
SCENES = [MARBLES, CAKES, FRUIT, MONEY, BUS]


@dataclass
class Story:
    """A problem while it is being told: its sentences, its worked steps, and the amount reached."""

    rng: random.Random
    scene: Scene
    slots: dict[str, str]
    amount: int
    question: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    steps: int = 0

    def draw(self, sentences: str) -> str:
        return self.rng.choice(sentences.split("; "))

    def tell(self, template: str, **numbers: int) -> str:
        """Add a sentence to the question; returns it without its full stop."""
        sentence = template.format(**self.slots, **numbers)
        self.question.append(sentence + ".")
        return sentence

    def work(self, event: str, left: int, sign: str, right: int, unit: str = "{x}") -> int:
        """Add a worked step, and return its result."""
        result = COMPUTE[sign](left, right)
        self.answer.append(f"{event}: {left} {sign} {right} = {result} {unit.format(**self.slots)}.")
        self.steps += 1
        return result


def make_problem(rng: random.Random, level: int) -> dict:
    """A problem of `level` steps: "question", "answer" (last line "#### result"), "level", "result"."""
    story = _begin(rng)
    last = rng.random() < 0.5
    while story.steps < level - last:
        _event(story, room=level - last - story.steps)
    asked = _last_step(story) if last else None
    while story.steps < level:
        _event(story, room=1)
    question = " ".join([*story.question, asked or story.draw(story.scene.ask).format(**story.slots)])
    answer = "\n".join([*story.answer, f"#### {story.amount}"])
    return {"question": question, "answer": answer, "level": level, "result": story.amount}


def _begin(rng: random.Random) -> Story:
    scene = rng.choice(SCENES)
    a, b = rng.sample(HE + SHE, 2)
    slots = {"A": a, "B": b, "his": "his" if a in HE else "her", "x": rng.choice(scene.things.split())}
    story = Story(rng, scene, slots, amount=rng.randint(3, 9))
    story.tell(story.draw(scene.start), n=story.amount)
    story.answer.append(f"At first: {story.amount} {slots['x']}.")
    return story


def _event(story: Story, room: int) -> None:
    """Something is gained (one step; two in packs) or lost; at least two are left, as 1 needs a singular."""
    rng, scene, amount = story.rng, story.scene, story.amount
    losses = range(2, min(9, amount - 2) + 1)
    gain = min(9, MAX_AMOUNT - amount)
    pack = room >= 2 and amount <= MAX_AMOUNT - 45
    kind = rng.choice(["lose"] * bool(losses) + ["gain"] * (gain >= 2) + ["pack"] * pack)
    if kind == "lose":
        n = rng.choice(losses)
        story.amount = story.work(story.tell(story.draw(scene.lose), n=n), amount, "-", n)
    elif kind == "gain":
        n = rng.randint(2, gain)
        story.amount = story.work(story.tell(story.draw(scene.gain), n=n), amount, "+", n)
    else:
        k, m = rng.randint(2, 5), rng.randint(2, 9)
        packed = story.work(story.tell(scene.pack, k=k, m=m), k, "*", m)
        story.amount = story.work("In all", amount, "+", packed)


def _last_step(story: Story) -> str | None:
    """Add an event with a question of its own, which is returned; None if no event suits the amount."""
    amount, rng = story.amount, story.rng
    divisors = [k for k in range(2, 10) if amount % k == 0 and amount > k]
    factors, terms = range(2, 6), range(2, 10)
    operands = {
        "times": ("*", factors),
        "price": ("*", factors),
        "plus": ("+", terms),
        "sum": ("+", terms),
        "minus": ("-", range(2, min(9, amount - 2) + 1)),
        "share": ("/", divisors),
        "fill": ("/", divisors),
    }
    kinds = [kind for kind in story.scene.last if operands[kind][1]]
    if not kinds:
        return None
    kind = rng.choice(kinds)
    sign, numbers = operands[kind]
    n = rng.choice(numbers)
    event, question, unit = story.scene.last[kind]
    story.amount = story.work(story.tell(event, n=n, k=n), amount, sign, n, unit)
    return question.format(**story.slots)
