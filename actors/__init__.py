"""Carries out: one file per kind of Ray actor."""
