"""Makes the wide picture of the README from those of docs/pictures: `python benchmarks/banner.py`.

Cells of the demo's grids, enlarged smoothly, on one dark strip. Nothing is drawn anew.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
CELL, STEP, LEFT, TOP = 48, 50, 15, 2  # of the grids, in pixels
SIDE, GAP, TITLE = 56, 4, 34  # of the strip
DARK, LIGHT = (16, 18, 24), (226, 230, 240)
PANELS = (  # title, file, rows and columns of its grid
    ("from noise to image", "trajectory", (0, 3, 4, 8), (0, 1, 2, 3, 5, 9)),
    ("by class", "demo_samples", (0, 2, 4, 8), (0, 1, 2, 4, 5, 7, 8)),
    ("the lower half drawn anew, five times", "editing_inpaint", (0, 2, 3, 9), range(6)),
)


def cell(grid: Image.Image, row: int, column: int) -> Image.Image:
    """One sample of a grid: back to its 16x16 pixels, then enlarged smoothly."""
    x, y = LEFT + STEP * column, TOP + STEP * row
    small = grid.crop((x, y, x + CELL, y + CELL)).resize((16, 16), Image.Resampling.NEAREST)
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def main() -> None:
    """Write docs/pictures/banner.png."""
    pitch, between = SIDE + GAP, 28
    widths = [pitch * len(columns) - GAP for _, _, _, columns in PANELS]
    width = sum(widths) + between * (len(PANELS) + 1)
    strip = Image.new("RGB", (width, TITLE + pitch * 4 + 20), DARK)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=17)
    x = between
    for (title, name, rows, columns), wide in zip(PANELS, widths, strict=True):
        grid = Image.open(PICTURES / f"{name}.png").convert("RGB")
        draw.text((x, 9), title, LIGHT, font)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                strip.paste(cell(grid, row, column), (x + pitch * j, TITLE + 4 + pitch * i))
        x += wide + between
    strip.save(PICTURES / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
