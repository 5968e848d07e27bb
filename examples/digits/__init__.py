"""The demo: does a source task hurt, and does DTNH help? Handwritten digits, minutes on a CPU."""
