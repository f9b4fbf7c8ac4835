"""A recipe: what to train, on which data, with which loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, Never, TypeVar

from distkit.config import Split, TrainConfig
from distkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset as TorchDataset

    from distkit.data import Dataset
    from distkit.data.reading.iterable import IterableData
    from distkit.losses import LossOutput
    from distkit.optim import ParamGroup
    from distkit.schedules import Schedule

C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True)
class Recipe(Generic[C]):
    """Plain functions and values that define what to train; the engine does the rest.

    Args:
        name: the first folder under `runs/`.
        config: the configuration class, a frozen dataclass that inherits from TrainConfig.
        build_model: config -> the model, on the CPU; called under one seed on every rank. A parameter named `train_set`
            is given the training set, also when a run is loaded later, which then takes the data.
        build_dataset: config, "train" or "test" -> a distkit Dataset or any map-style torch dataset (for training also
            an IterableData); None where there is no test set.
        compute_loss: config, model, batch (what `fetch` and `augment` of the data set give) -> LossOutput.
        presets: named starting points; the first one is the default.
        build_loss: config -> a loss with parameters of its own. It becomes `model.criterion`, and is trained and saved
            with the model.
        build_frozen: config -> a module that helps the loss and is not trained (a teacher, a perceptual network);
            called under one seed on every rank. It is moved to the device, in evaluation mode, and given to
            compute_loss as its parameter `frozen`. No checkpoint has it; a resume compares its digest.
        compute_metrics: (sums of all samples by name, float64 on the CPU; number of samples) -> the metrics that are
            reported, such as F1 out of a confusion matrix; default: each sum / samples.
        build_param_groups: config, model -> parameter groups; default: no weight decay on norms and biases.
        build_schedule: config, number of steps -> `step -> multiplier`; default: config.schedule. A parameter named
            `steps_per_epoch` is given the steps of an epoch, a float.
        init_model_: config, model, training set -> None; for weights that depend on data.
        best: the evaluation metric that decides what is best, and whether it should fall or rise.
        expected_initial_loss: config -> the loss of an untrained model, which debug mode checks.
        resolve_config: config -> config with what the data decide filled in, such as the number of classes. Called
            before anything is built; what it returns is the run's configuration, and comes back as it is.
    """

    name: str
    config: type[C]
    build_model: Callable[..., nn.Module]
    build_dataset: Callable[[C, Split], Dataset | TorchDataset[object] | IterableData | None]
    compute_loss: Callable[..., LossOutput]
    presets: Mapping[str, C]
    build_loss: Callable[[C], nn.Module] | None = None
    build_frozen: Callable[[C], nn.Module] | None = None
    compute_metrics: Callable[[dict[str, Tensor], int], dict[str, float]] | None = None
    build_param_groups: Callable[[C, nn.Module], list[ParamGroup]] | None = None
    build_schedule: Callable[..., Schedule] | None = None
    init_model_: Callable[..., None] | None = None
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")
    expected_initial_loss: Callable[[C], float] | None = None
    resolve_config: Callable[[C], C] | None = None

    def __post_init__(self) -> None:
        name, best = self.name, self.best
        is_word = isinstance(name, str) and 0 < len(name) <= 100 and name == name.strip(". ")
        if not is_word or not set(name).isdisjoint("/\\\0\n"):
            raise ConfigError("a recipe has a name that is no folder's", expected="a word, such as cifar10",
                              got=repr(name)[:60])  # fmt: skip
        if not (isinstance(self.config, type) and issubclass(self.config, TrainConfig)):
            raise ConfigError(f"recipe {name} has no configuration class", got=repr(self.config)[:60],
                              expected="a class that inherits from TrainConfig")  # fmt: skip
        if not isinstance(self.presets, Mapping) or not self.presets:
            raise ConfigError(f"recipe {name} has no presets", expected="at least one", fix='{"default": Config()}')
        for preset, config in self.presets.items():
            if not isinstance(config, self.config):
                raise ConfigError(f"the preset {preset} of recipe {name} is no configuration",
                                  expected=f"a {self.config.__name__}", got=repr(config)[:60])  # fmt: skip
        pair = best if isinstance(best, tuple) and len(best) == 2 else (None, None)
        if not isinstance(pair[0], str) or pair[1] not in ("min", "max"):
            raise ConfigError(f"best of recipe {name} does not say which evaluation is best",
                              expected="a metric, and whether it should fall or rise", got=repr(best)[:60],
                              fix='best=("loss", "min")')  # fmt: skip

    def __getattr__(self, name: str) -> Never:
        """Tells a recipe file written for `recipe.main()` what to write instead."""
        if name == "main":
            raise ConfigError("Recipe.main() no longer exists", fix="from distkit import main; main(recipe)")
        raise AttributeError(f"a Recipe has no {name}")
