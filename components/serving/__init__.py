"""Serves a checkpoint over the OpenAI chat API, on the engine that training rolled out with."""
