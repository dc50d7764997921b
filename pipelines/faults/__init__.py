"""Faults on purpose: real runs are disturbed, started again, and compared with an undisturbed one."""
