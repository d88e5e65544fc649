"""What one would write without rq-models: read a CSV, predict, write Parquet, in one process and one loop.

It prints the seconds from the first byte read to the last one written; to import and to load the model is not among
them, for a worker has done that long before, too.
"""

import sys
import time

import pyarrow as pa
from iris_model.iris_predict import IrisModel
from iris_model.schemas import IrisInput
from pyarrow import csv, parquet

ROWS = 1024
"""Given to the model at a time; 512 and 2048 are as fast, more is slower."""


def score(source: str, output: str, model: IrisModel) -> None:
    """Write the rows of `source` with the species that the model takes them for."""
    names = list(IrisInput.model_fields)
    writer = None
    with csv.open_csv(source) as reader:
        for block in reader:
            species: list[str] = []
            for start in range(0, block.num_rows, ROWS):
                rows = block.slice(start, ROWS).select(names).to_pylist()
                outputs = model.predict_batch([IrisInput(**row) for row in rows])
                species += [one.species for one in outputs]
            scored = block.append_column("species", pa.array(species))
            writer = writer or parquet.ParquetWriter(output, scored.schema)
            writer.write_batch(scored)
    if writer:
        writer.close()


if __name__ == "__main__":
    model = IrisModel()
    began = time.perf_counter()
    score(*sys.argv[1:], model)
    print(time.perf_counter() - began)  # noqa: T201 - what it is asked for
