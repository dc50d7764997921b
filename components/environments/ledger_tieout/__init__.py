"""Financial audit: does every page of a report state what the ledger says? The statements balance by construction."""

from components.environments.ledger_tieout.environment import LedgerTieout

__all__ = ["LedgerTieout"]
