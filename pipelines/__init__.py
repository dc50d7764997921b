"""The pipelines, their profiles and the command line."""
