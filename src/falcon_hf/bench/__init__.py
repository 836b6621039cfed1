"""Measuring decoding methods against plain ``generate()``: questions, methods, runs, reports."""
