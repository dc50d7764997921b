"""Continued pre-training: dense base, indexer warm-up, sparse training."""
