"""How --help looks: plain, whole at 80 columns, with the less common flags in sections of their own at the end.

typer's tables would give each of five columns a share of the width, and cut the names of flags.
"""

import os

import typer
from typer.core import TyperCommand, TyperGroup

OPTIONS = "Options"
NARROW = 26  # columns of the names of flags; what is wider has a line of its own


class Command(TyperCommand):
    """A command whose options are listed by the panel (`rich_help_panel`) that they name, common ones first."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx, formatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], OPTIONS: []}
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name, section = parameter.metavar, "Arguments"
                record = None if parameter.hidden else (name, parameter.help or "")
            else:
                record, section = parameter.get_help_record(ctx), parameter.rich_help_panel or OPTIONS
            if record is not None:
                sections.setdefault(section, []).append((_strong(record[0]), record[1]))
        for title, records in sections.items():
            if records:
                with formatter.section(_strong(title)):
                    formatter.write_dl(records, col_max=NARROW)


class Group(TyperGroup):
    """The commands, each with the whole first sentence of its help."""

    def format_commands(self, ctx, formatter) -> None:
        with formatter.section(_strong("Commands")):
            formatter.write_dl([(_strong(name), one.help.split("\n\n")[0]) for name, one in self.commands.items()])


def _strong(text: str) -> str:
    """`text` in bold, which echo takes out again where the output is no terminal."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, bold=True)
