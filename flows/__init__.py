"""How stages compose: one file a deployable flow, and the command line."""
