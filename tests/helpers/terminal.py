"""What a terminal shows of the bytes that a program wrote to it."""

import re

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


def screen(text: str, columns: int = 10**6) -> list[str]:
    """Lines, oldest first, that \\r, \\n, cursor up and erasing leave; longer ones are wrapped."""
    lines, row, column = [[]], 0, 0
    for argument, command, character in TOKEN.findall(text):
        if command == "A":
            row = max(0, row - int(argument or 1))
        elif command == "K":
            del lines[row][column:]
        elif character == "\r":
            column = 0
        elif character == "\n" or (character and column == columns):
            row, column = row + 1, 0
        if character and character not in "\r\n":
            if row == len(lines):
                lines.append([])
            line = lines[row]
            line += " " * (column - len(line))
            line[column : column + 1] = character
            column += 1
        while row >= len(lines):
            lines.append([])
    return ["".join(line).rstrip() for line in lines]
