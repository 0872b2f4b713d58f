"""Numbers found by evolution: those with which the model agrees best with the intact one."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.budget import Budget, Numbers, Scores, by_index, order_of
from moe_lab.option import Option
from moe_lab.profile.intact_predictions import IntactPredictions
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
FINEST = 128  # numbers of hidden units of a layer among which is chosen
Vector = tuple[int, ...]


@dataclass(frozen=True)
class Evolutionary(Budget):
    """EvoESAP (2603.06003): evolve the layers' numbers under a fixed total, by ESAP.

    Which experts of a layer stay is the metric's order throughout. The first generation begins with
    twelve shapes (the same number everywhere, rising, falling, early, late, ...; those of the
    paper's code) and is filled up at random. The best `parents` of a generation live on; the others
    are mutations of one of them: the lesser of two draws from 1 to `moves` says how often experts
    change from one layer to another, drawn again where a layer has no room. Fitness is
    `IntactPredictions.acceptance`; the fittest ever seen is taken. One difference: with round_to,
    or routers with groups, what moves is so many experts at a time.
    """

    num_samples: Annotated[int, Option("first calibration samples, for the fitness", least=1)] = 64
    population: Annotated[int, Option("vectors of numbers in a generation", least=1)] = 32
    generations: Annotated[int, Option("how many generations", least=1)] = 50
    parents: Annotated[int, Option("how many of a generation live on", least=1)] = 4
    moves: Annotated[int, Option("most moves from a parent to a child", least=1)] = 3
    most_moved: Annotated[int, Option("most experts of a move", least=1)] = 4
    attempts: Annotated[int, Option("most draws for the moves of a child", least=1)] = 32
    seed: Annotated[int, Option("seed of what is drawn")] = 0

    takes_groups = False

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible budget, and a search that could not be; say what it costs."""
        super().check(layers)
        self.check_something(layers)
        if self.parents >= self.population:
            raise UserError(
                f"ratio.parents={self.parents}: fewer than ratio.population={self.population} "
                "can live on"
            )
        most = self.population + (self.generations - 1) * (self.population - self.parents)
        logger.info(
            "ratio=evolutionary: at most %d forwards over %d samples, and one of the intact model",
            most, self.num_samples,
        )  # fmt: skip

    def numbers(self, scores: Scores, profile: Profile) -> Numbers:
        """How many experts each layer keeps, by layer index."""
        layers = [info for info, _ in scores]
        options = dataclasses.asdict(self)
        for name in ("ratio", "of", "target_gib"):
            del options[name]  # the total is what they come to
        question = {
            "question": "evolutionary numbers of experts",
            "options": options | {"total": self.total(layers)},
            "order": {str(info.index): order_of(info, score) for info, score in scores},
        }
        answer = profile.remember(question, lambda: self._search(scores, profile), [self])
        numbers = {int(index): number for index, number in answer.pop("numbers").items()}
        return Numbers(numbers, {"kept_per_layer": by_index(numbers)} | answer)

    def notes(self, scores: Scores, numbers: Numbers) -> dict[str, Any]:
        """kept_per_layer; acceptance: the best of each generation; forwards that this took."""
        return numbers.found

    def _search(self, scores: Scores, profile: Profile) -> dict[str, Any]:
        layers = [info for info, _ in scores]
        step, total = self.stride(layers, FINEST), self.total(layers)
        choices = [self.choices(info, step) for info in layers]
        sample = IntactPredictions(*profile.open_model(self.num_samples))

        def numbers_of(removed: Vector) -> dict[int, int]:
            pairs = zip(layers, choices, removed, strict=True)
            return {info.index: one[-1] - step * gone for info, one, gone in pairs}

        def fitness(removed: Vector) -> float:
            return sample.acceptance(budget.kept(scores, numbers_of(removed)))

        best, path, forwards = self.evolve(
            [len(one) - 1 for one in choices],
            -(-(sum(one[-1] for one in choices) - total) // step),
            fitness,
        )
        return {"numbers": by_index(numbers_of(best)), "acceptance": path, "forwards": forwards}

    def evolve(
        self, rooms: Sequence[int], total: int, fitness: Callable[[Vector], float]
    ) -> tuple[Vector, list[float], int]:
        """The fittest vector with this sum and at most `rooms` at each place.

        Also the best fitness of each generation, and how many vectors were looked at.
        """
        generator = random.Random(self.seed)
        known: dict[Vector, float] = {}
        people = first_generation(rooms, total, self.population, generator)
        path = []
        for generation in progress(range(self.generations), "evolution"):
            for one in people:
                if one not in known:
                    known[one] = fitness(one)
            fittest = sorted(people, key=known.__getitem__, reverse=True)[: self.parents]
            path.append(known[fittest[0]])
            if generation < self.generations - 1:
                missing = range(self.population - len(fittest))
                children = [self._mutated(generator.choice(fittest), rooms, generator)
                            for _ in missing]  # fmt: skip
                people = fittest + children
        # Dictionaries keep the order of insertion: of equals the first one seen.
        return max(known, key=known.__getitem__), path, len(known)

    def _mutated(self, parent: Vector, rooms: Sequence[int], generator: random.Random) -> Vector:
        child = list(parent)
        wanted = min(generator.randint(1, self.moves), generator.randint(1, self.moves))
        for _ in range(self.attempts):
            givers = [place for place, number in enumerate(child) if number > 0]
            takers = [place for place, number in enumerate(child) if number < rooms[place]]
            if not wanted or not givers or not takers:
                break
            giver, taker = generator.choice(givers), generator.choice(takers)
            if giver == taker:
                continue
            number = generator.randint(1, self.most_moved)
            if child[giver] >= number and child[taker] + number <= rooms[taker]:
                child[giver] -= number
                child[taker] += number
                wanted -= 1
        return tuple(child)


def first_generation(
    rooms: Sequence[int], total: int, size: int, generator: random.Random
) -> list[Vector]:
    """Shapes of removal over the layers, then random ones; each has the sum `total`."""
    count = len(rooms)
    middle, quarter = (count - 1) / 2, max(1, count // 4)
    shapes: list[Callable[[int], float]] = [
        lambda i: 1.0,
        lambda i: generator.random() + 1e-4,
        lambda i: i + 1.0,
        lambda i: float(count - i),
        lambda i: middle - abs(i - middle) + 1,
        lambda i: abs(i - middle) + 1,
        lambda i: 0.7**i + 1e-4,
        lambda i: 1.3**i,
        lambda i: 2.0 if i < quarter else 1.0,
        lambda i: 2.0 if i >= count - quarter else 1.0,
        lambda i: 2.0 if i % 2 == 0 else 1.0,
        lambda i: 0.5 + 0.5 * (1 - abs(2 * i / max(count - 1, 1) - 1)),
    ]
    rest = max(0, size - len(shapes))
    chosen = shapes[:size] + [shapes[1]] * rest
    return [shared_out([shape(i) for i in range(count)], rooms, total) for shape in chosen]


def shared_out(weights: Sequence[float], rooms: Sequence[int], total: int) -> Vector:
    """`total` in proportion to the weights, in whole numbers, none above its room.

    Rounded down, then one more where the remainder is largest, then one more each in turn.
    """
    wanted = [total * weight / sum(weights) for weight in weights]
    given = [min(int(share), room) for share, room in zip(wanted, rooms, strict=True)]
    order = sorted(range(len(rooms)), key=lambda i: given[i] - wanted[i])
    while (left := total - sum(given)) > 0:
        for place in [i for i in order if given[i] < rooms[i]][:left]:
            given[place] += 1
        order = sorted(order)
    return tuple(given)
