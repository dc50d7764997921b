"""Judges a candidate: plays held-out tasks, measures the sparse attention, decides the gate, moves the champion."""
