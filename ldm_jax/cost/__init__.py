"""Cost of a program: operations, and time and memory read from compiled HLO text."""
