"""A site's profile, slurm/site.toml: how a cluster wants its jobs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from distkit.errors import ConfigError, nearest
from distkit.files import read_regular
from distkit.json_files import MAX_BYTES

SITE_FILE = Path("slurm/site.toml")
CONTINUATIONS = ("requeue", "chain")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a site's profile says.

    Raises:
        ConfigError: a value has the wrong type, or is none that it may be.
    """

    partition: str = ""
    """sbatch --partition; empty: the cluster's default, also below."""
    account: str = ""
    """sbatch --account."""
    qos: str = ""
    """sbatch --qos."""
    gpus: str = "--gpus-per-node={gpus}"
    """The option that asks for GPUs; {gpus} is their number per node."""
    options: tuple[str, ...] = ()
    """Further options of sbatch."""
    modules: tuple[str, ...] = ()
    """Loaded with `module load`, in this order, before the ranks start."""
    python: str = ""
    """The ranks' interpreter; empty: the batch script's."""
    container: tuple[str, ...] = ()
    """Words before the interpreter, such as apptainer exec --nv IMAGE."""
    srun: tuple[str, ...] = ()
    """Further options of srun, such as --container-image=IMAGE (pyxis)."""
    interface: str = ""
    """Network interface between nodes; empty: that of the first node's host name. One node uses loopback."""
    scratch: str = ""
    """A folder on each node's own disk, for --stage; may contain variables of the job, such as $TMPDIR."""
    environment: tuple[str, ...] = ()
    """Further environment variables that ranks inherit, by name; NAME* stands for all that begin so."""
    continuation: str = "requeue"
    """requeue: the job requeues itself; chain: jobs of one name follow each other (--dependency=singleton)."""
    max_requeues: int = 100
    """Requeues of a job at most, >= 0; SLURM's own count."""

    def __post_init__(self) -> None:
        if self.continuation not in CONTINUATIONS:
            raise _wrong("continuation", " or ".join(CONTINUATIONS), self.continuation, '"requeue"')
        if self.max_requeues < 0:
            raise _wrong("max_requeues", "a whole number, 0 or more", self.max_requeues, "100")
        if self.gpus and not _asks_for_gpus(self.gpus):
            raise _wrong("gpus", "an option with {gpus} in it, or nothing", self.gpus, '"--gres=gpu:{gpus}"')
        for name, words in (("options", self.options), ("srun", self.srun)):
            if odd := [word for word in words if not word.startswith("-")]:
                raise _wrong(name, "options that begin with --", odd[0], f'["--{odd[0].strip()}"]')
        if odd := [name for name in self.environment if not name.removesuffix("*").isidentifier()]:
            raise _wrong("environment", "names of variables, or NAME*", odd[0], '["MY_*"]')


def _asks_for_gpus(option: str) -> bool:
    try:
        return "{gpus}" in option and option.startswith("-") and "8" in option.format(gpus=8)
    except (LookupError, ValueError):
        return False


def read_site(path: Path) -> Site:
    """The profile in a TOML file.

    Raises:
        ConfigError: there is none, it is no TOML, or it says something that no site can want.
    """
    try:
        values = tomllib.loads(read_regular(path, MAX_BYTES).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no site profile {path}", expected="the profile of this cluster",
                          fix="cd to the folder with slurm/ in it, or --site FILE") from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read", expected="a TOML file", got=error) from error
    try:
        return Site(**{name: _checked(name, value) for name, value in values.items()})  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _checked(name: str, value: object) -> object:
    """`value`, as the field `name` has it."""
    defaults: Mapping[str, object] = {field.name: field.default for field in fields(Site)}
    if name not in defaults:
        close = nearest(name, defaults)
        raise ConfigError(f"{name} is no setting of a site", expected=", ".join(defaults),
                          fix=close and f"{close} = …")  # fmt: skip
    default = defaults[name]
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise _wrong(name, "a list of words", value, '["WORD", "WORD"]')
        return tuple(value)
    if type(value) is not type(default):
        kind, example = ("a whole number", "100") if isinstance(default, int) else ("text in quotes", '"TEXT"')
        raise _wrong(name, kind, value, example)
    return value


def _wrong(name: str, expected: str, got: object, example: str) -> ConfigError:
    return ConfigError(f"{name} has a value it cannot take", expected=expected, got=got, fix=f"{name} = {example}")


def sbatch_options(site: Site, gpus: int) -> Sequence[str]:
    """The options that this site wants for a job with `gpus` GPUs on each node.

    Raises:
        ConfigError: one has a space in it: a shell would make two of it.
    """
    named = {"partition": site.partition, "account": site.account, "qos": site.qos}
    words = [f"--{name}={value}" for name, value in named.items() if value]
    if gpus and site.gpus:
        words.append(site.gpus.format(gpus=gpus))
    words += site.options
    for word in words:
        if any(letter.isspace() for letter in word):
            raise ConfigError(f"the option {word!r} has a space in it", expected="options without spaces",
                              fix="write it into an #SBATCH line of slurm/train.sbatch instead")  # fmt: skip
    return words
