"""A labelled sheet: one edit at several strengths of both guidances."""
from PIL import Image, ImageDraw, ImageFont

from .images import wrap


def grid_sheet(picture: Image.Image, cells: list[Image.Image], title: str, cfg_text: list[float],
               cfg_image: list[float]) -> Image.Image:
    """Rows are image scales, columns text scales; the input stands at the left, the title above all.

    cells: len(cfg_image) * len(cfg_text) pictures of one size, row by row. The input is shown at their size.
    """
    assert len(cells) == len(cfg_image) * len(cfg_text), f"{len(cells)} pictures for {len(cfg_image)} x {len(cfg_text)} scales"
    width, height = cells[0].size
    font = ImageFont.load_default(max(13, max(width, height) // 16))
    gap = int(font.size) // 2
    line = sum(font.getmetrics())
    columns, rows = [f"text {s:g}" for s in cfg_text], [f"image {s:g}" for s in cfg_image]
    label = max(font.getlength(text) for text in ["input", *columns, *rows])
    pitch_x, pitch_y = int(max(width, label)) + gap, max(height, line) + gap
    left = gap + pitch_x + int(label) + gap              # of the first cell; the rows' labels are between it and the input
    total_width = left + len(columns) * pitch_x
    lines = wrap(title, font, total_width - 2 * gap)
    top = gap + len(lines) * line + gap + line + gap     # of the first cell; the columns' labels are above it

    sheet = Image.new("RGB", (total_width, top + len(rows) * pitch_y), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text, anchor):
        draw.text((x, y), text, "black", font, anchor=anchor)

    for i, text in enumerate(lines):
        write(gap, gap + i * line, text, "la")
    middle = top + ((len(rows) - 1) * pitch_y) // 2      # the input's upper edge: halfway down
    sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (gap, middle))
    write(gap + width // 2, middle - gap, "input", "md")
    for i, text in enumerate(columns):
        write(left + i * pitch_x + width // 2, top - gap, text, "md")
    for j, text in enumerate(rows):
        write(left - gap, top + j * pitch_y + height // 2, text, "rm")
    for k, cell in enumerate(cells):
        j, i = divmod(k, len(columns))
        sheet.paste(cell, (left + i * pitch_x, top + j * pitch_y))
    return sheet
