"""Transfer between handwritten digits with and without DTNH, in minutes on a CPU."""
