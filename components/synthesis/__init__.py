"""Synthesis: from environments to a validated task set, demonstrations and long documents."""
