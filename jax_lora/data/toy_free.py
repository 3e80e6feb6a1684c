"""The toy tasks with free, short answers, one function each, in the order of their numbers.

A function returns an input and its answer, its docstring is the task's definition. Test
categories are among those of the real test split.
"""

from jax_lora.data import toy_words as w
from jax_lora.data.toy_words import Dice, ToyTask, registers

TASKS: list[ToyTask] = []
train, test = registers(TASKS, first=101)

# ---------------------------------------------------------------- train


@train("Program Execution")
def first_word(dice: Dice) -> tuple[str, str]:
    """You are given some words. Write down only the first of them and leave out all others."""
    items = dice.some(w.ANIMALS + w.COLOURS + w.THINGS, dice.number(3, 6))
    return " ".join(items), items[0]


@train("Program Execution")
def last_word(dice: Dice) -> tuple[str, str]:
    """You are given some words. Write down only the last of them and leave out all others."""
    items = dice.some(w.ANIMALS + w.COLOURS + w.THINGS, dice.number(3, 6))
    return " ".join(items), items[-1]


@train("Program Execution")
def upper_case(dice: Dice) -> tuple[str, str]:
    """You are given two words. Write both of them in capital letters, in the same order."""
    text = " ".join(dice.some(w.ANIMALS + w.COLOURS + w.FOODS, 2))
    return text, text.upper()


@train("Program Execution")
def swap_words(dice: Dice) -> tuple[str, str]:
    """You are given two words. Write them in reverse order: the second word first, then the first
    word."""
    one, other = dice.some(w.ANIMALS + w.COLOURS + w.FOODS, 2)
    return f"{one} {other}", f"{other} {one}"


@train("Mathematics")
def larger_number(dice: Dice) -> tuple[str, str]:
    """You are given two different numbers. Compare them and write the larger of the two."""
    one, other = dice.some(range(1, 100), 2)
    return f"{one} and {other}", str(max(one, other))


@train("Information Extraction")
def extract_person(dice: Dice) -> tuple[str, str]:
    """You are given two sentences. One of them is about a person. Write down the name of that
    person and nothing else."""
    who = dice.pick(w.PEOPLE)
    return f"{w.distractor(dice)} {w.bought(who, dice.pick(w.THINGS), dice.pick(w.CITIES))}", who


@train("Information Extraction")
def extract_city(dice: Dice) -> tuple[str, str]:
    """You are given a sentence about something that was bought. Write down the name of the city
    that the sentence mentions."""
    city = dice.pick(w.CITIES)
    return w.bought(dice.pick(w.PEOPLE), dice.pick(w.THINGS), city), city


@train("Information Extraction")
def extract_date(dice: Dice) -> tuple[str, str]:
    """You are given a sentence about an event. Extract the date, that is the day and the month,
    exactly as it is written in the sentence."""
    date = f"{dice.number(1, 28)} {dice.pick(w.MONTHS)}"
    return f"The {dice.pick(w.PLACES)} in {dice.pick(w.CITIES)} opens on {date}.", date


@train("Information Extraction")
def extract_colour(dice: Dice) -> tuple[str, str]:
    """You are given a sentence. It contains the name of one colour. Write down that colour as one
    word."""
    colour = dice.pick(w.COLOURS)
    return f"{dice.pick(w.PEOPLE)} painted the {dice.pick(w.THINGS)} {colour}.", colour


@train("Word Semantics")
def opposite(dice: Dice) -> tuple[str, str]:
    """You are given a describing word and an example of its use. Write the word that means the
    opposite of the describing word."""
    pair = dice.pick(w.OPPOSITES)
    word, answer = dice.pick([pair, pair[::-1]])
    return f"Word: {word}\nExample: the {word} {dice.pick(w.THINGS)}", answer


@train("Word Semantics")
def plural(dice: Dice) -> tuple[str, str]:
    """You are given a noun and a sentence with a gap. Write the plural of the noun, which fills
    the gap."""
    one, many = dice.pick(w.PLURALS)
    where = f"{dice.pick(w.PLACES)} in {dice.pick(w.CITIES)}"
    return f"Noun: {one}\nSentence: I saw two ___ near the {where}.", many


@train("Fill in The Blank")
def past_tense(dice: Dice) -> tuple[str, str]:
    """You are given a sentence with a verb in brackets. Write the verb in the past tense so that
    it fits the sentence."""
    verb, past = dice.pick(w.PAST)
    where = f"{dice.pick(w.PLACES)} on {dice.pick(w.DAYS)}"
    return f"{dice.pick(w.PEOPLE)} ({verb}) to the {where}.", past


@train("Question Answering")
def who_did_it(dice: Dice) -> tuple[str, str]:
    """You are given two sentences and a question about one of them. Answer the question with the
    name of the right person."""
    people, things = dice.some(w.PEOPLE, 2), dice.some(w.THINGS, 2)
    asked = dice.number(0, 1)
    text = f"{people[0]} sold a {things[0]}. {people[1]} sold a {things[1]}."
    return f"{text}\nQuestion: Who sold a {things[asked]}?", people[asked]


@train("Question Answering")
def where_is_it(dice: Dice) -> tuple[str, str]:
    """You are given two sentences that say where two things are, and a question about one of the
    things. Answer with the name of the room only."""
    things, rooms = dice.some(w.THINGS, 2), dice.some(w.ROOMS, 2)
    asked = dice.number(0, 1)
    text = f"The {things[0]} is in the {rooms[0]}. The {things[1]} is in the {rooms[1]}."
    return f"{text}\nQuestion: Where is the {things[asked]}?", rooms[asked]


@train("Sentence Composition")
def reorder_words(dice: Dice) -> tuple[str, str]:
    """You are given the words of a short sentence in the wrong order. Put them in the right order
    and write the sentence."""
    who, thing = dice.pick(w.PEOPLE), dice.pick(w.THINGS)
    start = [who, dice.pick(["bought", "sold", "painted", "lost"])]
    items = [*start, "the", dice.pick(w.COLOURS), thing]
    return " ".join(dice.some(items, len(items))), " ".join(items) + "."


@train("Question Generation")
def ask_where(dice: Dice) -> tuple[str, str]:
    """You are given a sentence that says where a person lives and works. Write the question that
    asks where the person works."""
    who = dice.pick(w.PEOPLE)
    cities = dice.some(w.CITIES, 2)
    return f"{who} lives in {cities[0]} and works in {cities[1]}.", f"Where does {who} work?"


# ---------------------------------------------------------------- test


@test("Coreference Resolution")
def pronoun(dice: Dice) -> tuple[str, str]:
    """You are given a sentence about a woman and a man, and a pronoun from it. Write the name of
    the person that the pronoun stands for."""
    woman, man, where = dice.pick(w.WOMEN), dice.pick(w.MEN), dice.pick(w.PLACES)
    first, second = dice.some((woman, man), 2)
    word, answer = dice.pick([("she", woman), ("he", man)])
    return f"{first} met {second} when {word} left the {where}.\nPronoun: {word}", answer


@test("Title Generation")
def headline(dice: Dice) -> tuple[str, str]:
    """You are given a short piece of news. Write a title for it that says what is new and in which
    city, in at most five words."""
    what, city = dice.pick(w.PLACES), dice.pick(w.CITIES)
    text = f"On {dice.pick(w.DAYS)} {dice.pick(w.PEOPLE)} opened a new {what} in {city}."
    return text + " Many people came to see it.", f"New {what} in {city}"


@test("Data to Text")
def describe_person(dice: Dice) -> tuple[str, str]:
    """You are given facts about a person: name, job and city. Write one sentence that says all
    of them."""
    who, job, city = dice.pick(w.PEOPLE), dice.pick(w.JOBS), dice.pick(w.CITIES)
    return f"name: {who} | job: {job} | city: {city}", f"{who} is a {job} in {city}."


@test("Keyword Tagging")
def animal_and_colour(dice: Dice) -> tuple[str, str]:
    """You are given a sentence. Write its two keywords, the animal and then the colour, with a
    comma between them."""
    animal, colour = dice.pick(w.ANIMALS), dice.pick(w.COLOURS)
    text = f"The {animal} slept under the {colour} {dice.pick(w.THINGS)}"
    return f"{text} of {dice.pick(w.PEOPLE)}.", f"{animal}, {colour}"


@test("Word Analogy")
def analogy(dice: Dice) -> tuple[str, str]:
    """You are given an analogy with a question mark. Two words are related as opposites. Write
    the word that is related to the third in the same way."""
    first, second = dice.some(w.OPPOSITES, 2)
    word, answer = dice.pick([second, second[::-1]])
    return f"{first[0]} : {first[1]} :: {word} : ?", answer


@test("Question Rewriting")
def proper_question(dice: Dice) -> tuple[str, str]:
    """You are given a question in careless words. Rewrite it as a proper English question that
    begins with the word Where."""
    who, verb = dice.pick(w.PEOPLE), dice.pick(["live", "work", "sing", "swim", "walk", "sleep"])
    day = dice.pick(w.DAYS)
    return f"{who} {verb}s where on {day}?", f"Where does {who} {verb} on {day}?"


@test("Overlap Extraction")
def shared_word(dice: Dice) -> tuple[str, str]:
    """You are given two sentences that mention the same thing. Write down the one noun that both
    sentences share."""
    thing = dice.pick(w.THINGS)
    first = f"{dice.pick(w.PEOPLE)} lost a {thing}."
    return f"1: {first}\n2: Someone found this {thing} in {dice.pick(w.CITIES)}.", thing
