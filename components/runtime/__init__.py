"""What every stage stands on: contracts, object store, tracking, settings, progress, reports."""
