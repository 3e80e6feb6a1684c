"""The small world that the toy tasks talk about: dice, word lists, sentences, and a task's form."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Random picks that are the same under every Python version.

    Only `Random.random()` is promised to be stable across versions, so everything is built on it.

    Arguments:
        names: what the picks are for; equal names give equal picks.
    """

    def __init__(self, *names: object) -> None:
        text = "\x1f".join(map(str, names))
        self._random = random.Random(int(hashlib.sha256(text.encode()).hexdigest(), 16))

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.number(0, len(items) - 1)]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]


def words(text: str) -> tuple[str, ...]:
    """The words of a string."""
    return tuple(text.split())


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`"a/b c/d"` as (("a", "b"), ("c", "d"))."""
    return tuple((left, right) for left, right in (pair.split("/") for pair in text.split()))


WOMEN = words("Anna Clara Emma Grace Julia Laura Maria Nora Olivia Rosa Sara Tina")
MEN = words("Adam Ben David Frank George Henry Jack Kevin Martin Oscar Peter Simon")
PEOPLE = WOMEN + MEN
CITIES = words(
    "Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Lisbon Boston Chicago Toronto Tokyo "
    "Cairo Sydney Athens Geneva"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words(
    "January February March April May June July August September October November December"
)
ANIMALS = words("dog cat horse fox rabbit goat sheep tiger lion bear duck frog mouse wolf")
COLOURS = words("red blue green yellow white black brown pink purple orange grey")
FOODS = words("bread cheese soup rice pasta salad cake honey apples tomatoes pizza butter")
THINGS = words(
    "lamp chair book clock table mirror guitar basket blanket camera bicycle suitcase bottle "
    "ladder hammer wallet phone jacket"
)
PLACES = words("garden market station library museum school park bakery hospital harbour")
ROOMS = words("kitchen bathroom bedroom garage attic cellar office hall")
JOBS = words("baker teacher doctor farmer painter singer driver lawyer nurse gardener")
GOOD = words("wonderful excellent great lovely perfect amazing fantastic delightful")
BAD = words("terrible awful horrible dreadful disappointing poor boring unpleasant")
OPPOSITES = pairs(
    "hot/cold big/small fast/slow old/new high/low heavy/light hard/soft rich/poor strong/weak "
    "clean/dirty wet/dry full/empty early/late happy/sad long/short loud/quiet open/closed "
    "thick/thin dark/bright cheap/expensive"
)
PAST = pairs(
    "walk/walked go/went run/ran drive/drove fly/flew swim/swam come/came travel/travelled "
    "return/returned hurry/hurried ride/rode move/moved sail/sailed jump/jumped"
)
PLURALS = pairs(
    "fox/foxes box/boxes city/cities baby/babies child/children man/men woman/women mouse/mice "
    "leaf/leaves knife/knives dog/dogs book/books chair/chairs dish/dishes bus/buses lamp/lamps "
    "tooth/teeth foot/feet sheep/sheep berry/berries"
)
IN_ROOM = {
    "kitchen": words("oven fridge frying-pan toaster kettle saucepan"),
    "bathroom": words("toothbrush shower bathtub towel shampoo soap"),
    "bedroom": words("pillow bed mattress pyjamas nightstand duvet"),
    "garage": words("car toolbox motorbike car-tyre engine-oil jack"),
}
# (event, its effect): every effect fits its own event and no other one.
EFFECTS = (
    ("dropped the glass on the floor", "The glass broke."),
    ("stayed in the sun all day", "The skin got burned."),
    ("forgot to water the plants", "The plants dried out."),
    ("left the ice cream on the table", "The ice cream melted."),
    ("ran ten miles without a break", "The legs got tired."),
    ("studied hard for the exam", "The exam went well."),
    ("missed the last bus home", "A taxi had to be called."),
    ("left the window open in the storm", "Rain came into the room."),
    ("did not charge the phone", "The battery went flat."),
    ("told a very funny joke", "Everybody laughed."),
    ("baked the cake for too long", "The cake was burnt."),
    ("ate nothing the whole day", "Great hunger came in the evening."),
)


def bought(who: str, thing: str, city: str) -> str:
    """The plainest sentence of this world."""
    return f"{who} bought a new {thing} in {city}."


def adjective(dice: Dice) -> str:
    """A describing word that is no colour."""
    return dice.pick(dice.pick(OPPOSITES))


def distractor(dice: Dice) -> str:
    """A sentence with neither person nor city."""
    return f"The {dice.pick(THINGS)} from the {dice.pick(PLACES)} was {adjective(dice)}."


@dataclass(frozen=True)
class ToyTask:
    """One task: `make(dice, label)` returns (input, answer); `labels` is empty for free text."""

    name: str
    split: str
    category: str
    definition: str
    labels: tuple[str, ...]
    make: Callable[[Dice, str], tuple[str, str]]


Register = Callable[..., Callable[[Callable], Callable]]


def registers(tasks: list[ToyTask], first: int) -> tuple[Register, Register]:
    """The decorators `train` and `test`, both called with a category and perhaps labels.

    Arguments:
        tasks: the list that they append to.
        first: the number of the first task.
    """

    def register(split: str, category: str, *labels: str) -> Callable[[Callable], Callable]:
        def add(function: Callable) -> Callable:
            def make(dice: Dice, label: str) -> tuple[str, str]:
                return (function(dice, label), label) if labels else function(dice)

            name = f"task{first + len(tasks):03d}_toy_{function.__name__}"
            definition = " ".join(str(function.__doc__).split())
            tasks.append(ToyTask(name, split, category, definition, labels, make))
            return function

        return add

    return partial(register, "train"), partial(register, "test")
