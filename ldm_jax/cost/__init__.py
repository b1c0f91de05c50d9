"""What a program costs: operations, and time and memory read from compiled HLO text."""
