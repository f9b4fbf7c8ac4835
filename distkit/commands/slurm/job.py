"""The batch script of one submission: slurm/train.sbatch with its options and arguments written into it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distkit.commands.slurm.site import Site, sbatch_options
from distkit.errors import ConfigError

#: sbatch(1): minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]].
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
#: Options of sbatch that follow from those of `distkit submit`.
OWN = ("nodes", "N", "ntasks", "n", "ntasks-per-node", "array", "a", "time", "t", "job-name", "J", "output", "o",
       "chdir", "D", "gpus-per-node", "wrap", "test-only", "wait", "W", "parsable", "help", "version")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job asks for.

    Attributes:
        nodes: >= 1.
        gpus: per node, >= 0.
        ranks: per node, >= 1.
        time: SLURM's time limit; None: the cluster's own.
        name: of the job.
        output: what the job prints is appended there.
        options: further ones of sbatch.

    Raises:
        ConfigError: the time or an option is none that sbatch takes.
    """

    nodes: int
    gpus: int
    ranks: int
    time: str | None
    name: str
    output: Path
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.time is not None:
            seconds_of(self.time)
        for option in self.options:
            if not option.startswith("--") or any(letter.isspace() for letter in option):
                raise ConfigError(f"--sbatch={option} is no option of sbatch", expected="--NAME=VALUE in one word",
                                  got=option, fix="--sbatch=--mem=64G")  # fmt: skip
            refuse_own(option, f"--sbatch={option}")

    def directives(self, site: Site) -> list[str]:
        """The options for #SBATCH lines."""
        own = {"job-name": self.name, "nodes": self.nodes, "time": self.time, "chdir": Path.cwd(),
               "output": self.output}  # fmt: skip
        words = [f"--{name}={shlex.quote(str(value))}" for name, value in own.items() if value is not None]
        for option in site.options:
            refuse_own(option, f"{option} in the site's options")
        return [*words, *sbatch_options(site, self.gpus), *self.options]


def refuse_own(option: str, said: str) -> None:
    """Refuse an option that a submission has decided already.

    Raises:
        ConfigError: quoting `said`.
    """
    name = option.lstrip("-").partition("=")[0]
    if name in OWN or (not option.startswith("--") and name[:1] in OWN):
        raise ConfigError(f"{said} contradicts what distkit submit writes itself", expected="another option",
                          got=option, fix="--nodes, --time, --gpus-per-node, --ranks")  # fmt: skip


def seconds_of(time: str) -> int:
    """A time limit as SLURM writes it.

    Raises:
        ConfigError: it is none, or no time at all.
    """
    found = TIME.fullmatch(time)
    seconds = 0
    if found is not None:
        numbers = [int(number) for number in found["fields"].split(":")]
        # with days the first field is hours; without, one or two fields begin with minutes
        begin = 1 if found["days"] is None and len(numbers) < 3 else 0
        units = (3600, 60, 1)[begin:]
        seconds = sum(number * unit for number, unit in zip(numbers, units, strict=False))
        seconds += 86_400 * int(found["days"] or 0)
    if seconds == 0:
        raise ConfigError(f"--time {time} is no time limit", expected="hours:minutes:seconds, days-hours or minutes",
                          got=time, fix="--time 4:00:00")  # fmt: skip
    return seconds


def write_script(
    template: str, directives: Sequence[str], setup: Sequence[str], arguments: Sequence[Sequence[str]]
) -> str:
    """The template with its arguments in it.

    Args:
        template: slurm/train.sbatch, or what a site has made of it.
        directives: options for #SBATCH lines; they replace those of the template with the same name.
        setup: lines of bash that come first.
        arguments: the template's own, as they are to be laid out in lines.
    """
    lines = template.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    names = {directive.partition("=")[0] for directive in directives}
    kept = [line.split(maxsplit=1)[1] for line in lines[:begin] if line.startswith("#SBATCH ")]
    kept = [option for option in kept if re.split("[ =]", option)[0] not in names]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Written by distkit submit, out of slurm/train.sbatch. To go on with the run, give it to sbatch again.",
            *(f"#SBATCH {option}" for option in (*kept, *directives)),
            *setup,
            "set -- \\",
            " \\\n".join(f"    {shlex.join(words)}" for words in arguments),
            *lines[begin:],
            "",
        ]
    )


def by_option(flags: Sequence[str]) -> list[list[str]]:
    """Flags with their values, an option in each list."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups
