"""Many predictions from many threads over one client; fails if any result is wrong. `scripts/demo` runs this."""

import sys
import time
from collections import Counter
from multiprocessing.pool import ThreadPool

from rq_models import Client

THREADS = 16
PREDICTIONS = 300
PATIENCE = 120
FLOWERS = [
    ("setosa", {"sepal_length": 5.0, "sepal_width": 3.2, "petal_length": 1.2, "petal_width": 0.2}),
    ("versicolor", {"sepal_length": 6.0, "sepal_width": 2.9, "petal_length": 4.5, "petal_width": 1.5}),
    ("virginica", {"sepal_length": 6.9, "sepal_width": 3.1, "petal_length": 5.4, "petal_width": 2.1}),
]


def main() -> int:
    """Print a row for each species and return the exit status."""
    work = [FLOWERS[number % len(FLOWERS)] for number in range(PREDICTIONS)]
    began = time.monotonic()
    with Client() as client, ThreadPool(THREADS) as pool:
        answers = pool.map(lambda one: client.predict("iris_model", one[1], timeout=PATIENCE), work, chunksize=1)
    seconds = time.monotonic() - began
    pairs = [(species, answer) for (species, _), answer in zip(work, answers, strict=True)]
    asked = Counter(species for species, _ in pairs)
    right = Counter(species for species, answer in pairs if answer == {"species": species})
    print(f"{'species':<12}{'asked':>6}{'right':>6}")
    for species, count in asked.items():
        print(f"{species:<12}{count:>6}{right[species]:>6}")
    print(f"{PREDICTIONS} predictions from {THREADS} threads in {seconds:.2f} s, {PREDICTIONS / seconds:.0f} a second")
    return 0 if right == asked else 1


if __name__ == "__main__":
    sys.exit(main())
