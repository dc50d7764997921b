"""The hidden world of `trip_planning`: weather, opening, prices and connections, drawn anew for each seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

from components.environments.words import CITIES
from components.runtime.contracts import digest

PLACES = ("museum", "cinema", "park", "market", "castle", "gallery", "theatre", "garden")
WEATHER = ("sun", "rain", "snow", "fog")
STATUS = ("open", "closed")
PRICE = ("low", "mid", "high")
MODES = ("train", "ferry", "bus", "plane")


@dataclass(frozen=True)
class World:
    """weather[city], status[city, place], price[city, place], travel[city, mode] -> city."""

    weather: dict[str, str]
    status: dict[tuple[str, str], str]
    price: dict[tuple[str, str], str]
    travel: dict[tuple[str, str], str]

    def look(self, tool: str, values: tuple[str, ...]) -> str:
        """The answer of a tool in words."""
        if tool == "weather":
            return self.weather.get(values[0], "error unknown city")
        if tool == "travel":
            return self.travel.get((values[0], values[1]), "error unknown city")
        place, city = values
        return (self.status if tool == "status" else self.price).get((city, place), "error unknown place")

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the facts."""
        pairs = [self.status, self.price, self.travel]
        return digest([self.weather, *(sorted((*key, value) for key, value in table.items()) for table in pairs)])


@lru_cache(maxsize=256)
def build_world(seed: int) -> World:
    """The world of `seed`."""
    rng = random.Random(f"trip_planning/{seed}")
    pairs = [(city, place) for city in CITIES for place in PLACES]
    return World(
        weather={city: rng.choice(WEATHER) for city in CITIES},
        status={pair: rng.choice(STATUS) for pair in pairs},
        price={pair: rng.choice(PRICE) for pair in pairs},
        travel={
            (city, mode): rng.choice([other for other in CITIES if other != city]) for city in CITIES for mode in MODES
        },
    )
