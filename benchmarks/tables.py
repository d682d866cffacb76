"""Tables as markdown, which is also readable on a terminal."""


def markdown(columns: list[str], rows: list[list]) -> str:
    table = [[("-" if cell is None else str(cell)) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) if i < len(row) else 0 for row in table) for i in range(len(columns))]

    def line(row: list[str]) -> str:
        cells = [*row, *["-"] * (len(columns) - len(row))]
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(table[0]), rule, *map(line, table[1:])]) + "\n"
