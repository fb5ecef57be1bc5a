"""Kinds of models that can be placed by module; all that is particular to one lies here."""
