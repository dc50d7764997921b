"""An environment of one's own, as small as it gets: a warehouse whose boxes lie on shelves.

Copy this file into your package, change the world and the questions, and name the class in your pyproject.toml:

    [project.entry-points."sparseline.environments"]
    warehouse = "my_package.warehouse:Warehouse"

Then `sparseline run --set synthesis.environments='[warehouse]'`. `components/environments/README.md` tells more.
"""

import random
from functools import lru_cache

from components.environments import scripted
from components.environments.words import CITIES, PRODUCTS

SHELVES = ("north", "south", "east", "west")

# 1. The tools that a player sees. Parameters are words; `page` would be a number.
TOOLS = [
    scripted.tool("where", "The shelf that a box lies on.", "box"),
    scripted.tool("destination", "The city that a box goes to.", "box"),
    scripted.tool("below", "The box that lies below another one.", "box"),
    scripted.submit_tool("Give the answer and end."),
]


# 2. The hidden world, drawn from a seed: a task record stores the seed, never the world.
@lru_cache(maxsize=256)
def build_world(seed):
    rng = random.Random(f"warehouse/{seed}")
    return {
        box: {
            "where": rng.choice(SHELVES),
            "destination": rng.choice(CITIES),
            "below": rng.choice([other for other in PRODUCTS if other != box]),
        }
        for box in PRODUCTS
    }


class Warehouse:
    name = "warehouse"
    version = "1"  # of the rules: raise it when old tasks could no longer be played
    generator_version = "1"  # of the generator: raise it when the same seed would give another task

    # 3. What can be asked. A template is the program behind the wording; splits hold out templates.
    def templates(self):
        return [f"{'below/' * hops}{question}" for hops in range(6) for question in ("where", "destination")]

    def long_templates(self):
        return []  # tasks beyond the training length, for evaluation only

    def describe(self, template):
        """Kinds of templates: the splits hold out some of each kind that has several."""
        *hops, question = template.split("/")
        return {"operator": question, "hops": min(len(hops), 1)}

    def tools(self):
        return TOOLS

    def vocabulary(self):
        """Every word that prompts, tool results and answers can contain: small models have a word-level tokenizer."""
        words = {*PRODUCTS, *CITIES, *SHELVES, *scripted.ERROR_WORDS, "the", "box", "times", "of", *"012345"}
        return sorted(words | scripted.tool_words(TOOLS))

    # 4. A task: the words of the user, the look-ups that the answer follows from, and the answer.
    def generate(self, template, seed, split):
        *hops, question = template.split("/")
        if template not in self.templates():
            raise ValueError(f"warehouse template {template!r} does not exist")
        rng = random.Random(f"{self.name}/{template}/{seed}")
        world_seed, box = rng.getrandbits(48), rng.choice(PRODUCTS)
        message, lookups = f"{question} of the box {len(hops)} times below {box}", []
        for _ in hops:
            lookups.append(("below", (box,)))
            box = build_world(world_seed)[box]["below"]
        lookups.append((question, (box,)))
        state = {"world_seed": world_seed, "start": message.split()[-1]}
        difficulty = {"operator": question, "hops": len(hops), "length": "standard"}
        answer = [build_world(world_seed)[box][question]]
        problem = scripted.Problem(message, state, lookups, answer, difficulty)
        return scripted.make_record(self, template, seed, split, problem, TOOLS)

    # 5. Playing it. LookupEpisode answers calls and judges: the answer is right, and nothing was guessed.
    def reset(self, task):
        scripted.check_version(self, task)
        world = build_world(task.initial_state["world_seed"])
        return scripted.LookupEpisode(
            task, str(task.initial_state), lambda tool, values: self.look(world, tool, *values)
        )

    def look(self, world, tool, box):
        return world[box][tool] if box in world else "error unknown box"

    def random_call(self, task, rng):
        if rng.random() < 0.2:
            return scripted.submission([rng.choice([*SHELVES, *CITIES])])
        return scripted.call_of(rng.choice(TOOLS[:-1]), [rng.choice(PRODUCTS)])

    # 6. Teachers to imitate before RL: a careful one, and wrong ones, so that there is something to unlearn.
    def wrong_kinds(self, task):
        return ["guesses", "skips_hop"] if task.difficulty["hops"] else ["guesses"]

    def shortcut(self, template):
        """Optional: the wrong kind that most demonstrations of a template follow. RL has to find what pays."""
        return "skips_hop" if template.count("below") >= 3 else None

    def play(self, task, kind, rng):
        talk = scripted.Conversation(self.reset(task))
        *hops, question = task.template.split("/")
        box = task.initial_state["start"]
        if kind == "guesses":
            talk.submit([rng.choice(CITIES if question == "destination" else SHELVES)])
            return talk.demonstration(kind)
        for hop in hops[1:] if kind == "skips_hop" else hops:
            (box,) = talk.look(hop, box)
        talk.submit(talk.look(question, box))
        return talk.demonstration(kind)
