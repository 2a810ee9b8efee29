"""Generated word problems with worked steps and a final answer, like GSM8K. Needs no network; seconds.

    python data/arithmetic/prepare.py

    Question: Tom has 8 marbles. Ida gives Tom 7 marbles. How many marbles does Tom have now?
    Answer: At first: 8 marbles.
    Ida gives Tom 7 marbles: 8 + 7 = 15 marbles.
    #### 15

The level of a problem is its number of equations, 1 to 5. Which tokens are hard is known: in the answer words
and operands are copied from the question or the line before, and only the digits after "=" are computed; in
the question names and numbers are random. No problem of test.jsonl is in the training or validation text
(compared by words and numbers). Its sums are: 8 + 7 = 15 occurs in many stories, so the test is of reading
and of chains of steps, not of unseen sums. Every digit is a token, and the vocabulary has only the characters
that occur. Problems have up to 200 tokens: use a block_size of 256 or more, or many answers are cut from
their questions.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse, require
from data import train_bpe, write_dataset
from data.arithmetic.problems import LEVELS, make_problem
from data.source import digest, print_summary

FOLDER = Path(__file__).parent
VOCAB_SIZE = 512
SPLIT = r" ?\p{L}+|\p{N}|\n| ?[^\s\p{L}\p{N}]+|\s"  # a digit is a token; so is the space before a number
TEST_PER_LEVEL = 300
VAL_FRACTION = 0.02
# The number of a line "#### ...", as people and models write it: after "=", ":" or "is"; with a currency, in
# bold or LaTeX; with groups of three digits, decimals, a scale, a unit. What makes another number of it must
# not follow: "1/2", "7-8", "3:30", "2 or 3", "1e3", "1,9".
MARKS = r"(?:[*_`'\"\u2019\u201c\u201d$€£¥₹\\{}()\[\] \t\u00a0\u202f]|boxed|(?:math|text)(?:bf|rm)?|USD?)*+"
BETWEEN = r"(?:[-+/^:*=x\u00d7\u00f7\u2212\u2013\u2014]|to|or|and|plus|minus|times|cdot|div)?"
FINAL_ANSWER = re.compile(
    rf"####(?:[^\n\d#]*?(?:[:=]|\bis\b))?{MARKS}(?P<minus>[-\u2212\u2013])?\+?{MARKS}(?=\.?[0-9])"
    r"(?P<number>(?:[0-9]{1,3}(?:(?:,|\{,\}|\\,|[ \u00a0\u202f'\u2019])[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?)"
    rf"(?!{MARKS}{BETWEEN}{MARKS}[0-9¼½¾⅓⅔²³]|[,.][0-9]|[eE][-+]?[0-9])"
    rf"{MARKS}(?P<scale>(?:(?i:thousand|million|billion|k)|M)\b)?"
)
SCALES = {"": 1, "k": 10**3, "m": 10**6, "thousand": 10**3, "million": 10**6, "billion": 10**9}


@dataclass(frozen=True)
class Options:
    """Options of data/arithmetic/prepare.py"""

    n_problems: int = 12_000  # for training and validation, equally many of each level; 1,000 are 0.34 MB
    seed: int = 1  # another seed makes other problems


def main(argv: list[str]) -> None:
    """Write the dataset arithmetic and its test.jsonl. ValueError: options out of range."""
    options = Options(**parse(argv, Options)[0])
    n_problems, seed = options.n_problems, options.seed
    require(100 <= n_problems <= 1_000_000, "n_problems", n_problems, "100 to 1,000,000")
    require(seed >= 0, "seed", seed, "at least 0")
    train, val, test = make_splits(n_problems, seed)
    train_docs, val_docs = [[document(problem) for problem in split] for split in (train, val)]
    tokenizer = train_bpe(train_docs + val_docs, VOCAB_SIZE, "arithmetic", SPLIT, only_seen_bytes=True)
    lines = "".join(json.dumps(problem) + "\n" for problem in test)
    sha256 = digest([("train", "".join(train_docs)), ("val", "".join(val_docs)), ("test", lines)])
    meta = write_dataset(FOLDER, train_docs, val_docs, tokenizer, sha256, {"test.jsonl": lines}, seed=seed)
    print_summary(FOLDER, meta)
    print(f"  test   {len(test):>9,} problems in test.jsonl")


def make_splits(n_problems: int, seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """Problems for training, validation and testing, no two alike; the test set depends on the seed only.

    Each is a dictionary with "question", "answer", "level" (number of steps) and "result" (int).
    """
    seen = set()
    test = _distinct(TEST_PER_LEVEL * len(LEVELS), f"test {seed}", seen)
    n_val = max(len(LEVELS), round(VAL_FRACTION * n_problems))
    rest = _distinct(n_problems, f"train {seed}", seen)
    return rest[n_val:], rest[:n_val], test


def document(problem: dict) -> str:
    """The text a model is trained on."""
    return f"{prompt_of(problem['question'])} {problem['answer']}\n"


def prompt_of(question: str) -> str:
    """The text a model is to continue: up to and including "Answer:"."""
    return f"Question: {question}\nAnswer:"


def is_correct(generated: str, result: Fraction) -> bool:
    return result_of(generated) == result


def result_of(text: str) -> Fraction | None:
    """The number of the first "#### NUMBER" in a text (FINAL_ANSWER); None if there is none."""
    if match := FINAL_ANSWER.search(text):
        number = Fraction(re.sub("[^0-9.]", "", match["number"])) * SCALES[(match["scale"] or "").lower()]
        return -number if match["minus"] else number
    return None


def normalized(question: str) -> str:
    """The words and numbers alone: problems that agree in this are the same problem."""
    return " ".join(re.findall(r"\w+", question.lower()))


def _distinct(count: int, seed: str, seen: set[str]) -> list[dict]:
    """`count` problems, cycling through the levels, whose normalized questions are new to `seen`."""
    rng = random.Random(seed)
    problems = []
    while len(problems) < count:
        problem = make_problem(rng, LEVELS[len(problems) % len(LEVELS)])
        key = normalized(problem["question"])
        if key not in seen:
            seen.add(key)
            problems.append(problem)
    return problems


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
