"""Knowledge-graph queries: 1 to 3 hops over a hidden typed graph, with aggregation and a paging tool."""

from components.environments.kg_query.environment import KnowledgeGraphQuery

__all__ = ["KnowledgeGraphQuery"]
