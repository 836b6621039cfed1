"""Beginnings of user turns, for the target to continue: they steer what a set of self-made prompts is about.

A stem may have places: ``{name}``, ``{other}``, ``{thing}``, ``{number}``, ``{topic}``, ``{subject}``, ``{activity}``,
``{task}``, ``{place}``, ``{job}``, ``{word}``. None of them comes from a benchmark; ``falcon-hf distill --exclude``
drops turns that quote one. Many fillings matter: a drafter that had seen three thousand dialogues of
few topics was right far less often on other topics (docs/training.md).
"""

from __future__ import annotations

import random

STEMS: dict[str, tuple[str, ...]] = {
    "open": ("", "", "", "", "I ", "My ", "The ", "Can you ", "Please ", "What ", "How ", "Why ", "Is it ", "Hi, "),
    "maths": (
        "{name} has {number} {thing}s. ",
        "{name} buys {number} {thing}s for ${number} each and ",
        "{name} and {other} share ",
        "A {job} earns ${number} an hour and works ",
        "A {thing} costs ${number}. If ",
        "There are {number} {thing}s in a {place}. ",
        "Every day {name} ",
        "{name} is {number} years old and ",
        "The sum of ",
        "A train travels ",
        "In a {place} there are {number} ",
        "If {number} {job}s can ",
        "{name} reads {number} pages ",
        "{name} baked {number} ",
        "Find the value of ",
        "Solve for x: ",
        "What is {number}% of ",
        "The ratio of ",
        "A rectangle has ",
        "Calculate ",
        "{name} drives {number} miles ",
        "On Monday, {name} sold {number} {thing}s. On Tuesday, ",
        "A box contains {number} red and {number} blue {thing}s. ",
        "Twice as many ",
    ),
    "code": (
        "Write a Python function ",
        "Write a function that takes a list ",
        "Write a Python program that ",
        "Write a Python function that {task}.",
        "Write a Python function that {task}. ",
        "Write a JavaScript function that {task}.",
        "Write a program that {task}, and explain how it works.",
        "Can you write code that {task}?",
        "Finish this function:\n\ndef {word}_{thing}s(",
        "Finish this function:\n\ndef ",
        "def {word}_{thing}(",
        'def count_{thing}s(items):\n    """',
        "Implement a {topic} ",
        "How do I ",
        "What does this code do?\n\n",
        "Write a SQL query ",
        "Write a JavaScript function ",
        "Write a C++ program ",
        "Explain the difference between ",
        "Fix the bug in this code:\n\n",
        "Write unit tests for ",
        "Given a string, ",
        "Given a list of integers, ",
        "Create a class ",
        "Write a regular expression ",
        "Implement an algorithm that ",
        "Write an HTML page ",
    ),
    "writing": (
        "Write a short story about {subject}.",
        "Write a poem about {subject}.",
        "Write a story about {subject} ",
        "Write a letter to a {job} about {subject}.",
        "Write a blog post about {activity}.",
        "Describe {subject} in one paragraph.",
        "Write an email to my {job} about {activity}.",
        "Write a short story about ",
        "Write an email to ",
        "Write a poem about ",
        "Compose ",
        "Draft ",
        "Describe ",
        "Write a blog post about ",
        "Write a letter to a {job} ",
        "Write a review of ",
        "Create a dialogue between a {job} and ",
        "Rewrite the following ",
        "Edit the following paragraph ",
        "Write a descriptive paragraph about a {place} ",
        "Write a speech ",
        "Write an opening ",
        "Write a product description for a {thing} ",
        "Summarize ",
        "Write a persuasive ",
        "Write a headline ",
    ),
    "roleplay": (
        "You are a {job}. Explain {topic} to ",
        "Pretend to be a {job} who loves {activity}. ",
        "Pretend you are a {job}. ",
        "Imagine you are ",
        "You are a {job}. ",
        "Act as a {job} ",
        "Picture yourself as ",
        "Take on the role of ",
        "From now on, you are ",
        "Play the part of ",
        "As a {job}, ",
    ),
    "reasoning": (
        "Why might a {job} prefer {activity} to {activity}?",
        "Compare {topic} with {topic}.",
        "Suppose ",
        "Imagine ",
        "If all ",
        "Three friends ",
        "{name} is taller than {other}, ",
        "Which ",
        "{name}'s mother has ",
        "One morning, ",
        "There is a {thing} ",
        "Each problem consists of ",
        "Is it true that ",
        "What would happen if ",
        "Identify the odd one out: ",
        "A man walks into a {place} ",
        "Given the following statements, ",
        "Determine whether ",
    ),
    "extraction": (
        "Extract ",
        "Given the following text, ",
        "Read the following paragraph and ",
        "Identify the named entities in ",
        "List all the {thing}s mentioned in ",
        "From the text below, ",
        "Evaluate the following {word} reviews ",
        "Given these categories, ",
        "Count how many ",
        "Analyze the following ",
        "Return a JSON ",
        "Classify the following ",
        "Translate ",
        "Turn the following into a table: ",
    ),
    "science": (
        "What is {topic}, and why does it matter?",
        "Explain {topic} in simple terms.",
        "Explain {topic} to a child.",
        "What are the advantages and disadvantages of {topic}?",
        "How is {topic} related to {topic}?",
        "Summarise {topic} in three sentences.",
        "What is {topic}? ",
        "Explain {topic} ",
        "How does {topic} ",
        "In the field of {topic}, ",
        "What are the main causes of ",
        "Describe the process of ",
        "What are the differences between ",
        "Why is the ",
        "What is the function of ",
        "Explain the concept of ",
        "How do scientists ",
        "What role does {topic} play ",
        "Give an overview of {topic} ",
    ),
    "humanities": (
        "Tell me about the history of {topic}.",
        "How has {topic} changed society?",
        "Discuss whether {topic} does more good than harm.",
        "Provide insights into ",
        "How did the ",
        "What were the causes of ",
        "Discuss ",
        "Compare and contrast ",
        "Who was ",
        "Analyze the impact of ",
        "Explain the importance of ",
        "What is the meaning of ",
        "Produce a lesson plan ",
        "Describe the history of ",
        "Share ideas for ",
        "What do you think about ",
        "Suggest ",
    ),
    "daily": (
        "Give me five tips for {activity}.",
        "What should I know before {activity}?",
        "How do I start {activity}?",
        "Plan a week of {activity} for a {job}.",
        "What do I need for {activity} in a {place}?",
        "Explain {activity} step by step.",
        "Give me tips ",
        "I want to ",
        "I need help with ",
        "Can you recommend ",
        "What should I ",
        "How can I ",
        "What's the best way to ",
        "List five ",
        "Make a list of ",
        "Plan a trip to ",
        "Give me a recipe for ",
        "Create a schedule ",
        "Tell me about ",
        "What are some ",
        "Help me ",
        "Brainstorm ",
    ),
}
"""Stems by kind."""

_FILLINGS: dict[str, str] = {
    "name": "Anna; Ben; Carla; David; Elena; Farid; Grace; Hugo; Ines; Jamal; Kate; Liam; Mona; Noah; Olga; "
    "Pedro; Rosa; Sam",
    "other": "Tina; Umar; Vera; Will; Xenia; Yusuf; Zoe; Maria; Tom; Lucy",
    "thing": "apple; book; pencil; ticket; flower; coin; marble; car; cookie; letter; plant; shirt; toy; phone; "
    "bottle; chair; candle; stamp; box; ball; lamp; sandwich; bag; brick; card; egg; sticker; boat; cup; "
    "window",
    "topic": "photosynthesis; gravity; inflation; recursion; electricity; evolution; democracy; encryption; "
    "erosion; genetics; magnetism; sorting; caching; metabolism; statistics; probability; climate change; "
    "chemistry; optics; networking; vaccination; plate tectonics; the water cycle; machine learning; "
    "supply and demand; the printing press; black holes; the immune system; antibiotics; nuclear energy; "
    "solar power; the stock market; insurance; taxes; trade unions; the Roman Empire; the Industrial "
    "Revolution; colonialism; the Cold War; ancient Egypt; the Silk Road; jazz; impressionism; theatre; "
    "poetry; the novel; cinema; architecture; urban planning; public transport; bicycles; the internet; "
    "social media; blockchain; databases; operating systems; version control; hash tables; binary search; "
    "graph theory; calculus; prime numbers; geometry; fractions; set theory; game theory; sleep; memory; "
    "stress; nutrition; vitamins; blood pressure; the heart; the lungs; bacteria; coral reefs; "
    "rainforests; volcanoes; earthquakes; hurricanes; the ozone layer; recycling; composting; bees; "
    "migration of birds; whales; dinosaurs; fossils; the solar system; the moon; tides; comets; rockets; "
    "satellites; radio waves; lasers; batteries; semiconductors; robots; drones; 3D printing; steel; "
    "concrete; glass; paper; plastics; fermentation; coffee; tea; chocolate; bread; rice; spices; wine; "
    "cotton; silk; fashion; music theory; the violin; chess; football; the Olympic Games; marathon "
    "running; yoga; meditation; philosophy; ethics; logic; religion; mythology; folklore; linguistics; "
    "translation; grammar; writing systems; education; homework; remote work; leadership; negotiation; "
    "marketing; advertising; entrepreneurship; accounting; interest rates; money; human rights; "
    "constitutions; elections; federalism; justice; privacy; copyright; censorship; journalism",
    "subject": "a lost dog; a lighthouse; two sisters; an old bookshop; a dragon who is afraid of fire; the last "
    "train home; a storm at sea; a robot that learns to paint; my grandmother's kitchen; a broken clock; "
    "the first day of school; a mountain village in winter; a secret garden; a thief with a good heart; "
    "the sound of rain; an island without a name; a letter that came too late; a long journey; "
    "friendship; autumn; a city that never sleeps; a forgotten song; the desert at night; a rivalry "
    "between two bakers; an unexpected guest; a child who can talk to birds; the smell of the ocean; "
    "moving to a new country; a family dinner; a magic mirror; the end of summer; a spaceship far from "
    "home; a wise old tree; an honest mistake; a detective's last case; a market in the morning; a snowy "
    "night; courage; a football match; a wedding; a river; the colour blue; a museum at midnight; a "
    "lonely king; a clever fox; a lost key; a new neighbour; a delayed order; a job interview; a school "
    "trip",
    "activity": "learning to cook; saving money; training for a race; growing tomatoes; learning a language; writing "
    "a novel; playing the guitar; buying a house; moving abroad; adopting a dog; baking bread; hiking in "
    "the mountains; learning to code; public speaking; sleeping better; eating less sugar; repairing a "
    "bicycle; painting a room; camping with children; starting a business; studying for exams; taking "
    "photographs; meditating; swimming; knitting; keeping bees; cleaning a kitchen; planning a wedding; "
    "managing a team; writing a resume; making new friends; reducing stress; travelling alone; drawing "
    "portraits; reading more books; recycling at home; buying a used car; preparing for an interview; "
    "organising a party; teaching children to read; building a website; riding a horse; making coffee; "
    "keeping a diary; volunteering; running a meeting; caring for houseplants; fishing; sewing; gardening",
    "task": "reverses a string; counts the vowels in a text; finds the largest number in a list; removes "
    "duplicates from a list; checks whether a word is a palindrome; sorts a list of dictionaries by a "
    "key; merges two dictionaries; reads a CSV file; computes the factorial of a number; converts "
    "temperatures; generates a random password; flattens a nested list; counts the words in a file; finds "
    "the most common word; rotates a matrix; checks whether brackets are balanced; converts a number to "
    "Roman numerals; computes the average of a list; finds all prime numbers up to n; groups words by "
    "their first letter; validates an email address; downloads a web page; simulates rolling dice; "
    "computes the distance between two points; implements a stack; implements a queue; searches a sorted "
    "list; prints a multiplication table; capitalises each word of a sentence; removes punctuation from a "
    "text; splits a list into chunks; finds the second smallest element; transposes a table; counts how "
    "often each letter occurs; computes compound interest; converts seconds to hours and minutes; finds "
    "common elements of two lists; writes a list to a JSON file; computes a running total; replaces words "
    "in a string; draws a triangle of stars; plays tic-tac-toe; keeps a to-do list; sends a reminder; "
    "finds the longest run of equal numbers; computes the greatest common divisor; parses a date; renames "
    "files in a folder; logs errors to a file; measures how long a call takes",
    "place": "school; library; garden; bakery; station; museum; forest; office; farm; village; harbour; hospital; "
    "market; kitchen; park; workshop; theatre; hotel",
    "job": "teacher; doctor; farmer; pilot; chef; lawyer; detective; nurse; scientist; gardener; carpenter; "
    "poet; plumber; baker; historian; programmer; musician; judge; firefighter; coach; landlord; manager; "
    "student; neighbour",
    "word": "find; get; check; sort; remove; merge; max; min; sum; first; last; reverse; movie; product",
}
"""What a place may hold, separated by semicolons."""


def draw_stem(random_state: random.Random, stems: list[str] | None = None) -> str:
    """One stem with its places filled: each kind as likely as any other, or one of ``stems``."""
    if stems is None:
        stem = random_state.choice(STEMS[random_state.choice(sorted(STEMS))])
    else:
        stem = random_state.choice(stems)
    for place, fillings in _FILLINGS.items():
        while "{" + place + "}" in stem:
            stem = stem.replace("{" + place + "}", random_state.choice(fillings.split("; ")), 1)
    while "{number}" in stem:
        stem = stem.replace("{number}", str(random_state.randint(2, 120)), 1)
    return stem.rstrip(" ")  # the target's next token brings its own space
