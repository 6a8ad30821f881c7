"""A screen of the terminal as an SVG picture: what rich draws, without its web font, so that the file asks the network for nothing."""

import io
from pathlib import Path

from rich.console import Console, RenderableType

FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
.{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def svg(screen: RenderableType, *, title: str, width: int) -> str:
    """The picture of anything rich can draw, `width` columns wide; the same screen gives the same bytes."""
    console = Console(record=True, file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", highlight=False)
    console.print(screen)
    return console.export_svg(title=title, code_format=FRAME, unique_id="screen")


def write(path: Path, screen: RenderableType, *, title: str, width: int) -> Path:
    """Write the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(screen, title=title, width=width))
    return path
