"""Writes the quickstart's instruction set beside this file: `python recipes/data/make_quickstart.py`.

A cafe's orders in free English and the tickets that its bar works from:

    Two large lattes with oat milk for Ada, please.    ->    2L latte + oat > Ada

The convention is made up, so an untrained model cannot know it, and systematic, so a small one learns it in some
dozens of steps. An order that names no size is medium. All answers are distinct: a held-out answer was never trained.
The draws come from `lorasp.hashing`: the same bytes on every machine, which a test checks.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from lorasp.hashing import random_int64, stream_key

TRAIN_ROWS, HELD_OUT_ROWS = 640, 128

QUANTITIES = {"one": 1, "two": 2, "three": 3, "four": 4}
SIZES = {"small": "S", "medium": "M", "large": "L", "": "M"}
DRINKS = ("latte", "mocha", "espresso", "chai", "matcha", "cocoa", "coffee", "tea", "lemonade", "cortado")
EXTRAS = {
    "": "",
    "oat milk": "oat",
    "soy milk": "soy",
    "almond milk": "almond",
    "cinnamon": "cinnamon",
    "honey": "honey",
    "vanilla": "vanilla",
    "ginger": "ginger",
    "cream": "cream",
}
# fmt: off
NAMES = (
    "Ada", "Adam", "Alice", "Anna", "Ben", "Clara", "Dan", "David", "Emma", "Eva", "Finn", "George", "Grace", "Helen",
    "Henry", "Hugo", "Iris", "Jack", "James", "Julia", "Kate", "Laura", "Leo", "Lily", "Lucy", "Maria", "Martin",
    "Max", "Mia", "Nina", "Noah", "Oliver", "Oscar", "Paul", "Peter", "Rosa", "Ruth", "Sam", "Sarah", "Simon", "Tom",
    "Vera", "Will",
)
# fmt: on
ORDERS = (
    "{Drinks} for {name}, please.",
    "{name} would like {drinks}.",
    "Can I get {drinks}? I'm {name}.",
    "For {name}: {drinks}.",
    "{name} asks for {drinks}.",
)
INSTRUCTIONS = ("Write the bar ticket.", "Make a ticket for the bar.", "Turn the order into a ticket.")


def quickstart_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training and the held-out rows, each {"instruction", "input", "output"}; no output occurs twice."""
    wanted = TRAIN_ROWS + HELD_OUT_ROWS
    fields = ("quantity", "size", "drink", "extra", "name", "order", "instruction", "layout")
    draws = [random_int64(stream_key("quickstart", field), 2 * wanted).tolist() for field in fields]
    rows: dict[str, dict[str, str]] = {}
    for numbers in zip(*draws, strict=True):
        row = _row(dict(zip(fields, numbers, strict=True)))
        rows.setdefault(row["output"], row)
    kept = list(rows.values())[:wanted]
    return kept[:TRAIN_ROWS], kept[TRAIN_ROWS:]


def _row(draw: dict[str, int]) -> dict[str, str]:
    def pick(field: str, choices: Iterable[str]) -> str:
        choices = tuple(choices)
        return choices[draw[field] % len(choices)]

    quantity, size, drink = pick("quantity", QUANTITIES), pick("size", SIZES), pick("drink", DRINKS)
    extra, name = pick("extra", EXTRAS), pick("name", NAMES)
    drinks = " ".join(filter(None, (quantity, size, drink if quantity == "one" else drink + "s")))
    if extra:
        drinks += f" with {extra}"
    order = pick("order", ORDERS).format(name=name, drinks=drinks, Drinks=drinks.capitalize())
    ticket = f"{QUANTITIES[quantity]}{SIZES[size]} {drink}" + (f" + {EXTRAS[extra]}" if extra else "") + f" > {name}"
    instruction = pick("instruction", INSTRUCTIONS)
    if draw["layout"] % 4 == 3:  # a quarter of the rows have the order within the instruction
        return {"instruction": f"{instruction.removesuffix('.')}: {order}", "input": "", "output": ticket}
    return {"instruction": instruction, "input": order, "output": ticket}


def render(rows: list[dict[str, str]]) -> str:
    """The file's text: a JSON list with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main() -> None:
    train, held_out = quickstart_rows()
    for name, rows in (("quickstart_train.json", train), ("quickstart_held_out.json", held_out)):
        Path(__file__).with_name(name).write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
