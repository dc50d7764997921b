"""The stages of Sparseline and what they stand on. Inside: stages -> rollouts -> environments -> runtime."""
