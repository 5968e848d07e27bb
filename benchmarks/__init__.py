"""What the rules cost, measured beside what they could cost: `python -m benchmarks --help`."""
