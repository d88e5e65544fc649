"""The benchmark: contenders in turns on the embedded server; scripts/bench runs it."""
