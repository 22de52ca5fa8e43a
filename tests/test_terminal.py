"""What stands in the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from fastgen.terminal import Bars


def test_a_warning_stands_whole_above_the_bar() -> None:
    bars, screen = Bars(), io.StringIO()
    bars.console = Console(file=screen, force_terminal=True, width=40, color_system=None)
    warning = "warning at step 7: critic lag: [bold]loss/critic[/bold] is 4; raise distiller.critic_updates or optimizer.fake_score.lr"
    bars.start("training", 10)
    bars.update(7, {})
    bars.warn(warning)
    bars.finish()
    lines = screen.getvalue().split("\n")
    assert sum(warning in line for line in lines) == 1
    assert "7/10" in lines[-2] or "7/10" in lines[-1]  # the bar ends below


def test_a_warning_without_a_bar() -> None:
    bars, screen = Bars(), io.StringIO()
    bars.console = Console(file=screen, width=20)
    bars.warn("a warning that is longer than a line")
    assert screen.getvalue() == "a warning that is longer than a line\n"
