"""The toy tasks with a closed set of answers, one function each, in the order of their numbers.

A task names its labels and is given one of them: its function returns an input with that answer.
The docstring is the task's definition. Test categories are among those of the real test split.
"""

from jax_lora.data import toy_words as w
from jax_lora.data.toy_words import Dice, ToyTask, registers

TASKS: list[ToyTask] = []
train, test = registers(TASKS, first=1)

# ---------------------------------------------------------------- train


@train("Sentiment Analysis", "positive", "negative")
def review_sentiment(dice: Dice, label: str) -> str:
    """In this task, you are given a short review. Decide whether the writer liked what is
    reviewed. Answer with positive or negative."""
    good = label == "positive"
    end = "I would go there again" if good else "I will never come back"
    word = dice.pick(w.GOOD if good else w.BAD)
    return f"The {dice.pick(w.FOODS)} at the {dice.pick(w.PLACES)} was {word} and {end}."


@train("Sentiment Analysis", "good", "bad", "mixed")
def product_opinion(dice: Dice, label: str) -> str:
    """You are given an opinion about two products. Say good if both are praised, bad if both are
    criticised, and mixed if one is praised and the other criticised."""
    sides = {"good": (w.GOOD, w.GOOD), "bad": (w.BAD, w.BAD)}
    first, second = sides.get(label) or dice.pick([(w.GOOD, w.BAD), (w.BAD, w.GOOD)])
    one, other = dice.some(w.THINGS, 2)
    return f"The {one} is {dice.pick(first)}, the {other} is {dice.pick(second)}."


@train("Sentiment Analysis", "happy", "sad", "angry", "afraid")
def mood_of_person(dice: Dice, label: str) -> str:
    """You are given a sentence about a person. Choose the word that says how the person feels:
    happy, sad, angry or afraid."""
    signs = {
        "happy": ("laughed with joy", "smiled all day", "danced and sang"),
        "sad": ("wept quietly", "cried all evening", "was in tears"),
        "angry": ("shouted in rage", "slammed the door", "was furious"),
        "afraid": ("trembled with fear", "hid in panic", "was terrified"),
    }
    time = f"on {dice.pick(w.DAYS)} in {dice.pick(w.CITIES)}"
    return f"{dice.pick(w.PEOPLE)} {dice.pick(signs[label])} {time}."


@train("Text Categorization", "sports", "food", "weather", "travel")
def sentence_topic(dice: Dice, label: str) -> str:
    """You are given one sentence from a newspaper. Name its topic, which is one of sports, food,
    weather and travel."""
    who, city, day = dice.pick(w.PEOPLE), dice.pick(w.CITIES), dice.pick(w.DAYS)
    return {
        "sports": f"{who} won the {dice.pick(['football match', 'race', 'tennis final'])} on {day}",
        "food": f"{who} cooked {dice.pick(w.FOODS)} with {dice.pick(w.FOODS)} on {day}",
        "weather": f"{dice.pick(['Rain', 'Snow', 'Strong wind'])} is expected in {city} on {day}",
        "travel": f"{who} took the {dice.pick(['train', 'plane', 'ferry'])} to {city} on {day}",
    }[label] + "."


@train("Text Categorization", "yes", "no")
def is_question(dice: Dice, label: str) -> str:
    """You are given words without a punctuation mark at the end. Is it a question? Answer yes if
    it asks something and no if it states something."""
    who, thing, city = dice.pick(w.PEOPLE), dice.pick(w.THINGS), dice.pick(w.CITIES)
    if label == "yes":
        return dice.pick([f"did {who} buy the {thing} in {city}", f"where is the {thing} of {who}"])
    return dice.pick([f"{who} did buy the {thing} in {city}", f"there is the {thing} of {who}"])


@train("Text Categorization", "yes", "no")
def mentions_animal(dice: Dice, label: str) -> str:
    """You are given a sentence. Does it mention an animal? Answer yes if it does and no if it
    does not."""
    what = dice.pick(w.ANIMALS if label == "yes" else w.THINGS)
    return f"{dice.pick(w.PEOPLE)} saw a {what} near the {dice.pick(w.PLACES)}."


@train("Text Categorization", "yes", "no")
def mentions_colour(dice: Dice, label: str) -> str:
    """You are given a sentence. Does it mention a colour? Answer yes if it does and no if it does
    not."""
    kind = dice.pick(w.COLOURS) if label == "yes" else w.adjective(dice)
    return f"{dice.pick(w.PEOPLE)} has the {kind} {dice.pick(w.THINGS)}."


@train("Commonsense Classification", "kitchen", "bathroom", "bedroom", "garage")
def room_of_object(dice: Dice, label: str) -> str:
    """You are given a sentence about an object at home. In which room does one usually find the
    object? Choose between kitchen, bathroom, bedroom and garage."""
    thing = dice.pick(w.IN_ROOM[label])
    return f"{dice.pick(w.PEOPLE)} is looking for the {thing} on {dice.pick(w.DAYS)}."


@train("Program Execution", "2", "3", "4", "5")
def count_words(dice: Dice, label: str) -> str:
    """You are given a list of words with commas between them. Count the words of the list. The
    answer is a number: 2, 3, 4 or 5."""
    return ", ".join(dice.some(w.ANIMALS + w.COLOURS + w.THINGS, int(label)))


@train("Named Entity Recognition", "person", "city", "animal", "food")
def entity_kind(dice: Dice, label: str) -> str:
    """You are given a sentence and one word of it. Say what the word stands for: person, city,
    animal or food."""
    kinds = {"person": w.PEOPLE, "city": w.CITIES, "animal": w.ANIMALS, "food": w.FOODS}
    chosen = {kind: dice.pick(names) for kind, names in kinds.items()}
    text = f"In {chosen['city']}, {chosen['person']} gave the {chosen['animal']} {chosen['food']}."
    return f"Sentence: {text}\nWord: {chosen[label]}"


@train("Text Matching", "yes", "no")
def same_meaning(dice: Dice, label: str) -> str:
    """You are given two sentences. Do they say the same in different words? Answer yes if they
    mean the same and no if they do not."""
    who, city = dice.pick(w.PEOPLE), dice.pick(w.CITIES)
    one, other = dice.some(w.THINGS, 2)
    thing = one if label == "yes" else other
    return f"1: {w.bought(who, one, city)}\n2: In {city}, a new {thing} was bought by {who}."


@train("Text Matching", "yes", "no")
def same_person(dice: Dice, label: str) -> str:
    """You are given two sentences. Are they about the same person? Answer yes if the person is
    the same and no if the persons differ."""
    one, other = dice.some(w.PEOPLE, 2)
    second = f"{one if label == 'yes' else other} lives in {dice.pick(w.CITIES)}."
    return f"1: {one} works as a {dice.pick(w.JOBS)}.\n2: {second}"


@train("Linguistic Probing", "singular", "plural")
def grammatical_number(dice: Dice, label: str) -> str:
    """You are given a sentence. Look at its subject and say whether it is singular (one) or
    plural (more than one)."""
    one, many = dice.pick([pair for pair in w.PLURALS if pair[0] != pair[1]])
    start = f"The {one} was" if label == "singular" else f"The {many} were"
    return f"{start} seen near the {dice.pick(w.PLACES)} in {dice.pick(w.CITIES)}."


@train("Linguistic Probing", "past", "present", "future")
def tense(dice: Dice, label: str) -> str:
    """You are given a sentence. Name the tense of its verb: past, present or future."""
    verb, past = dice.pick(w.PAST)
    form = {"past": past, "present": f"likes to {verb}", "future": f"will {verb}"}
    return f"{dice.pick(w.PEOPLE)} {form[label]} to the {dice.pick(w.PLACES)}."


# ---------------------------------------------------------------- test


@test("Textual Entailment", "yes", "no")
def follows(dice: Dice, label: str) -> str:
    """You are given two sentences. Does the second follow from the first? Answer yes if it must
    be true and no if it need not be."""
    who, city = dice.pick(w.PEOPLE), dice.pick(w.CITIES)
    one, other = dice.some(w.THINGS, 2)
    thing = one if label == "yes" else other
    return f"1: {w.bought(who, one, city)}\n2: {who} bought a {thing}."


@test("Textual Entailment", "entailment", "contradiction", "neutral")
def three_way_entailment(dice: Dice, label: str) -> str:
    """You are given two sentences. Answer entailment if the second is true given the first,
    contradiction if it is false, and neutral if one cannot tell."""
    who, thing = dice.pick(w.PEOPLE), dice.pick(w.THINGS)
    word, inverse = dice.pick(w.OPPOSITES)
    second = {"entailment": word, "contradiction": inverse, "neutral": dice.pick(w.COLOURS)}[label]
    return f"1: The {thing} of {who} is very {word}.\n2: The {thing} is {second}."


@test("Cause Effect Classification", "A", "B")
def choose_effect(dice: Dice, label: str) -> str:
    """You are given an event and two sentences A and B. Which of them is the effect of the event?
    Answer with the letter A or B."""
    (event, effect), (_, wrong) = dice.some(w.EFFECTS, 2)
    first, second = (effect, wrong) if label == "A" else (wrong, effect)
    return f"{dice.pick(w.PEOPLE)} {event}.\nA: {first}\nB: {second}"


@test("Answerability Classification", "yes", "no")
def answerable(dice: Dice, label: str) -> str:
    """You are given a sentence and a question. Can the question be answered with what the
    sentence says? Answer yes or no."""
    who = dice.pick(w.PEOPLE)
    told = ["Where does {} live?", "In which city does {} live?", "What is the job of {}?"]
    untold = ["How old is {}?", "When was {} born?", "What is the favourite food of {}?"]
    question = dice.pick(told if label == "yes" else untold).format(who)
    text = f"{who} is a {dice.pick(w.JOBS)} and lives in {dice.pick(w.CITIES)}."
    return f"{text}\nQuestion: {question}"


@test("Dialogue Act Recognition", "question", "request", "greeting", "thanks")
def dialogue_act(dice: Dice, label: str) -> str:
    """You are given what one person says to another. Classify it as question, request, greeting
    or thanks."""
    who, thing, where = dice.pick(w.PEOPLE), dice.pick(w.THINGS), dice.pick(w.PLACES)
    return {
        "question": f"{who}, where did you buy that {thing}?",
        "request": f"{who}, please bring me the {thing} from the {where}.",
        "greeting": f"Good morning, {who}, nice to see you at the {where}!",
        "thanks": f"Thank you so much for the {thing}, {who}!",
    }[label]
