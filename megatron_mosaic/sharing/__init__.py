"""How modules share a GPU: lanes with SM quotas, with priorities, or one after the other."""
