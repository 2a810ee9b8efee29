"""Word problems of 1 to 5 steps: somebody has a number of things, events change it, a question is asked.

Every sentence comes from a table below. Slots: {A} and {B} people ({his}: A's), {x} the things, {n} an
amount, {k} a small factor, {m} the things in one pack, {q} an equation such as "12 + 7 = 19".
"""

import random
from dataclasses import dataclass, field

LEVELS = range(1, 6)
MAX_AMOUNT = 99
HE = "Ali Ben Hugo Ivan Ken Leo Max Noah Omar Tom".split()
SHE = "Ana Eva Ida Jane Lily Maya Nina Rosa Sara Zoe".split()


@dataclass(frozen=True)
class Scene:
    """A setting. `gain` and `lose`: events of one step; `pack`: of two; `last`: (questions, worked step)."""

    things: list[str]
    start: list[str]
    gain: list[str]
    lose: list[str]
    pack: tuple[str, str]
    ask: list[str]
    more: list[str]
    less: list[str]
    last: dict[str, tuple[str, str]]


FRIENDS = {
    "times": ("{B} has {k} times as many {x} as {A}. How many {x} does {B} have?", "{B} has {q} {x}."),
    "plus": ("{B} has {n} more {x} than {A}. How many {x} does {B} have?", "{B} has {q} {x}."),
    "minus": ("{B} has {n} fewer {x} than {A}. How many {x} does {B} have?", "{B} has {q} {x}."),
    "sum": ("{B} has {n} {x}. How many {x} do {A} and {B} have together?", "Together they have {q} {x}."),
}
SHARING = {
    "share": (
        "{A} divides all of {his} {x} equally among {k} children. How many {x} does each child get?",
        "Each child gets {q} {x}.",
    ),
    "fill": (
        "{A} puts all of {his} {x} into bags of {k}. How many bags does {A} fill?",
        "{A} fills {q} bags.",
    ),
    "price": (
        "{A} sells all of {his} {x} for {k} dollars each. How many dollars does {A} get?",
        "{A} gets {q} dollars.",
    ),
}
MORE = ["Now {A} has {q} {x}.", "That makes {q} {x}.", "So {A} has {q} {x}."]
LESS = ["Now {A} has {q} {x}.", "That leaves {q} {x}.", "So {A} has {q} {x} left."]

SCENES = [
    Scene(
        things="badges balloons beads buttons cards coins crayons marbles pencils stamps stickers".split(),
        start=[
            "{A} has {n} {x}.",
            "{A} owns {n} {x}.",
            "{A} keeps {n} {x} in a box.",
            "There are {n} {x} on {A}'s desk.",
        ],
        gain=[
            "{A} finds {n} more {x}.",
            "{B} gives {A} {n} {x}.",
            "Then {A} buys {n} more {x}.",
            "{A} wins {n} {x}.",
        ],
        lose=[
            "{A} loses {n} {x}.",
            "{A} gives {n} {x} to {B}.",
            "Then {A} sells {n} {x}.",
            "{B} takes {n} of the {x}.",
        ],
        pack=("{A} buys {k} bags with {m} {x} each.", "The bags hold {q} {x}."),
        ask=["How many {x} does {A} have now?", "How many {x} are there in the end?"],
        more=MORE,
        less=LESS,
        last=FRIENDS | SHARING,
    ),
    Scene(
        things="buns cakes cookies muffins pancakes pies pretzels rolls waffles".split(),
        start=["{A} bakes {n} {x}.", "{A} makes {n} {x} for a party.", "On Monday {A} bakes {n} {x}."],
        gain=["Then {A} bakes {n} more {x}.", "{B} brings {A} {n} {x}.", "{A} makes another {n} {x}."],
        lose=[
            "{A} sells {n} {x}.",
            "The guests eat {n} of the {x}.",
            "{A} gives {n} {x} to {B}.",
            "{n} of the {x} burn.",
        ],
        pack=("{A} fills {k} trays with {m} new {x} each.", "The trays hold {q} {x}."),
        ask=["How many {x} does {A} have now?", "How many {x} are there in the end?"],
        more=MORE,
        less=LESS,
        last=FRIENDS | SHARING,
    ),
    Scene(
        things="apples carrots cherries lemons onions peaches pears plums potatoes tomatoes".split(),
        start=[
            "{A} picks {n} {x}.",
            "{A} harvests {n} {x} from the garden.",
            "In the morning {A} gathers {n} {x}.",
        ],
        gain=["{A} picks {n} more {x}.", "{B} gives {A} {n} {x}.", "Then {A} gathers another {n} {x}."],
        lose=["{A} cooks {n} of the {x}.", "{A} throws away {n} bad {x}.", "{A} gives {n} {x} to {B}."],
        pack=("{A} gets {k} baskets with {m} {x} each.", "The baskets hold {q} {x}."),
        ask=["How many {x} does {A} have now?", "How many {x} are there in the end?"],
        more=MORE,
        less=LESS,
        last=FRIENDS | SHARING,
    ),
    Scene(
        things=["dollars"],
        start=["{A} has {n} dollars.", "{A} earns {n} dollars.", "There are {n} dollars in {A}'s purse."],
        gain=[
            "{A} finds {n} dollars.",
            "{B} gives {A} {n} dollars.",
            "{A} gets {n} dollars for cleaning a car.",
        ],
        lose=["{A} spends {n} dollars.", "{A} pays {n} dollars for a book.", "{A} gives {n} dollars to {B}."],
        pack=("{A} works {k} hours for {m} dollars an hour.", "The work brings {q} dollars."),
        ask=["How many dollars does {A} have now?", "How much money does {A} have in the end?"],
        more=MORE,
        less=LESS,
        last=FRIENDS
        | {
            "fill": (
                "{A} spends it all on pens for {k} dollars each. How many pens does {A} buy?",
                "{A} buys {q} pens.",
            )
        },
    ),
    Scene(
        things="children passengers players students tourists workers".split(),
        start=["There are {n} {x} on a bus.", "A bus leaves with {n} {x}.", "{A} drives a bus with {n} {x}."],
        gain=["Then {n} more {x} get on.", "At the park {n} {x} get on.", "At the next stop {n} {x} get on."],
        lose=[
            "Then {n} {x} get off.",
            "At the bridge {n} {x} get off.",
            "At the next stop {n} {x} leave the bus.",
        ],
        pack=("At the station {k} groups of {m} {x} get on.", "The groups bring {q} {x}."),
        ask=["How many {x} are on the bus now?", "How many {x} are there in the end?"],
        more=["Now there are {q} {x}.", "That makes {q} {x}.", "So the bus carries {q} {x}."],
        less=["Now there are {q} {x}.", "That leaves {q} {x}.", "So the bus carries {q} {x}."],
        last={
            "price": (
                "All {x} pay {k} dollars each. How many dollars do they pay together?",
                "They pay {q} dollars.",
            ),
            "fill": ("All {x} form teams of {k}. How many teams are there?", "There are {q} teams."),
            "plus": (
                "Another bus has {n} more {x} than this one. How many {x} does it have?",
                "It has {q} {x}.",
            ),
            "minus": (
                "Another bus has {n} fewer {x} than this one. How many {x} does it have?",
                "It has {q} {x}.",
            ),
        },
    ),
]


@dataclass
class Story:
    """A problem while it is being told: its sentences, its worked steps, and the amount reached."""

    rng: random.Random
    scene: Scene
    slots: dict[str, str]
    amount: int
    question: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def tell(self, template: str, **numbers: int) -> None:
        """Add a sentence to the question."""
        self.question.append(template.format(**self.slots, **numbers))

    def work(self, template: str, left: int, sign: str, right: int) -> int:
        """Add a worked step, and return its result."""
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        self.steps.append(template.format(**self.slots, q=f"{left} {sign} {right} = {result}"))
        return result


def make_problem(rng: random.Random, level: int) -> dict:
    """A problem of `level` steps: "question", "answer" (last line "#### result"), "level", "result"."""
    story = _begin(rng)
    last = rng.random() < 0.5
    while len(story.steps) < level - last:
        _event(story, room=level - last - len(story.steps))
    if not (last and _last_step(story)):
        while len(story.steps) < level:
            _event(story, room=1)
        story.tell(rng.choice(story.scene.ask))
    answer = "\n".join([*story.steps, f"#### {story.amount}"])
    return {"question": " ".join(story.question), "answer": answer, "level": level, "result": story.amount}


def _begin(rng: random.Random) -> Story:
    scene = rng.choice(SCENES)
    a = rng.choice(HE + SHE)
    b = rng.choice([name for name in HE + SHE if name != a])
    slots = {"A": a, "B": b, "his": "his" if a in HE else "her", "x": rng.choice(scene.things)}
    story = Story(rng, scene, slots, amount=rng.randint(3, 9))
    story.tell(rng.choice(scene.start), n=story.amount)
    return story


def _event(story: Story, room: int) -> None:
    """Something is gained (one step; two in packs) or lost; a result of 1 would need a singular noun."""
    rng, scene, amount = story.rng, story.scene, story.amount
    losses = [n for n in range(2, min(9, amount) + 1) if amount - n != 1]
    gain = min(9, MAX_AMOUNT - amount)
    kinds = (
        ["lose"] * bool(losses)
        + ["gain"] * (gain >= 2)
        + ["pack"] * (room >= 2 and amount <= MAX_AMOUNT - 45)
    )
    kind = rng.choice(kinds)
    if kind == "lose":
        n = rng.choice(losses)
        story.tell(rng.choice(scene.lose), n=n)
        story.amount = story.work(rng.choice(scene.less), amount, "-", n)
    elif kind == "gain":
        n = rng.randint(2, gain)
        story.tell(rng.choice(scene.gain), n=n)
        story.amount = story.work(rng.choice(scene.more), amount, "+", n)
    else:
        k, m = rng.randint(2, 5), rng.randint(2, 9)
        story.tell(scene.pack[0], k=k, m=m)
        story.amount = story.work(rng.choice(scene.more), amount, "+", story.work(scene.pack[1], k, "*", m))


def _last_step(story: Story) -> bool:
    """End with a question that takes one step itself; False if the scene has none that suits the amount."""
    amount, rng = story.amount, story.rng
    divisors = [k for k in range(2, 10) if amount % k == 0 and amount > k]
    factors, terms = list(range(2, 6)), list(range(2, 10))
    operands = {
        "times": ("*", factors),
        "price": ("*", factors),
        "plus": ("+", terms),
        "sum": ("+", terms),
        "minus": ("-", [n for n in terms if n < amount - 1]),
        "share": ("/", divisors),
        "fill": ("/", divisors),
    }
    kinds = [kind for kind in story.scene.last if operands[kind][1] and amount > 1]
    if not kinds:
        return False
    kind = rng.choice(kinds)
    sign, numbers = operands[kind]
    n = rng.choice(numbers)
    question, worked = story.scene.last[kind]
    story.tell(question, n=n, k=n)
    story.amount = story.work(worked, amount, sign, n)
    return True
