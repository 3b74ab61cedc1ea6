"""`chela-bench completion`: the script that makes a shell complete chela-bench's words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """The completion script of a shell, on stdout. To install it, add to the shell's start-up file:

    \b
      bash, ~/.bashrc:                    eval "$(chela-bench completion bash)"
      zsh, ~/.zshrc, after compinit:      eval "$(chela-bench completion zsh)"
      fish, ~/.config/fish/config.fish:   chela-bench completion fish | source

    \b
    Example:  chela-bench completion bash
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "chela-bench", "_CHELA_BENCH_COMPLETE").source()
    # click's fish script cuts a value at its first comma; ours are comma-separated lists.
    click.echo(script.replace('string split ","', 'string split --max 1 ","'))
