"""How every command reads its options, and how it explains them; vLLM's names for the same things."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from enum import Enum
from typing import Any

import typer
from typer.core import TyperCommand

#: Names that vLLM has for options of ours.
VLLM_NAMES = {
    "--max-num-seqs": "--max-running",
    "--max-num-batched-tokens": "--max-pass-rows",
    "--enable-prefix-caching": "--prefix-cache",
    "--no-enable-prefix-caching": "--no-prefix-cache",
    "--ssl-certfile": "--tls-certificate",
    "--ssl-keyfile": "--tls-key",
    "--allowed-origins": "--cors-origin",
    "--otlp-traces-endpoint": "--otlp-endpoint",
    "-tp": "--tensor-parallel-size",
}

#: Columns of help: where the explanations begin, and how wide it is at least and at most.
_BEGIN, _LEAST, _MOST = 27, 60, 100


class Command(TyperCommand):
    """A command whose help has one column of names and one of explanations, with every default, in 80 columns.

    An option of vLLM's name is taken for ours.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in parameter.opts + parameter.secondary_opts}
        return super().parse_args(ctx, [_translated(word, known) for word in args])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = max(_LEAST, min(shutil.get_terminal_size().columns, _MOST))
        arguments = [one for one in self.params if one.param_type_name == "argument"]
        names = " ".join(f"[{_shown(one)}]" if not one.required else _shown(one) for one in arguments)
        lines = [f"Usage: {ctx.command_path} [OPTIONS] {names}", ""]
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            lines += [*textwrap.wrap(paragraph, width), ""]
        for one in arguments:
            lines += _explained(_shown(one), getattr(one, "help", "") or "", width)
        groups: dict[str, list[Any]] = {}
        for one in self.get_params(ctx):
            if one not in arguments and not getattr(one, "hidden", False):
                groups.setdefault(getattr(one, "rich_help_panel", None) or "Options", []).append(one)
        for title, options in groups.items():
            lines += ["", f"{title}:"]
            for one in options:
                left = "/".join([*one.opts, *one.secondary_opts]) + _value(one)
                lines += _explained(left, _explanation(one), width)
        prefix = ctx.auto_envvar_prefix
        if prefix:
            text = f"Every option is an environment variable too: --some-name is {prefix}_SOME_NAME."
            lines += ["", *textwrap.wrap(text, width)]
        formatter.write("\n".join(lines) + "\n")


def _translated(word: str, known: set[str]) -> str:
    """An option under our name, where vLLM has another for it."""
    name, equals, value = word.partition("=")
    ours = VLLM_NAMES.get(name)
    return f"{ours}{equals}{value}" if ours in known and name not in known else word


def _shown(argument: Any) -> str:
    return (argument.metavar or argument.name).upper()


def _value(option: Any) -> str:
    """What stands for the value of an option behind its name."""
    default = option.default
    if getattr(option, "is_flag", False) or isinstance(default, bool) or "--help" in option.opts:
        return ""
    if option.metavar:
        return f" {option.metavar}"
    if isinstance(default, Enum):
        return f" {'|'.join(str(one.value) for one in type(default))}"
    return " N" if isinstance(default, int) else " X" if isinstance(default, float) else " TEXT"


def _explanation(option: Any) -> str:
    """An option's help with its default, if that is a value: otherwise the help says what happens without it."""
    default = option.default
    text = (option.help or "").rstrip()
    if default is None or callable(default) or default is False or "--help" in option.opts:
        return text
    if isinstance(default, Enum):
        default = default.value
    elif default is True:
        default = "on"
    elif isinstance(default, float) and default.is_integer():
        default = int(default)
    return f"{text} Default: {default}." if option.show_default is not False else text


def _explained(left: str, text: str, width: int) -> list[str]:
    """A name and its explanation, side by side."""
    wrapped = textwrap.wrap(text, width - _BEGIN, break_on_hyphens=False) or [""]
    if len(left) > _BEGIN - 4:
        return [f"  {left}", *(" " * _BEGIN + line for line in wrapped)]
    return [f"  {left:<{_BEGIN - 2}}{wrapped[0]}".rstrip(), *(" " * _BEGIN + line for line in wrapped[1:])]


def show_version(asked: bool) -> None:
    """The callback of `--version`."""
    if asked:
        from fastblt import __version__

        typer.echo(f"fastblt {__version__}")
        raise typer.Exit
