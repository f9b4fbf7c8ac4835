"""Models that recipes combine, and ways to initialise them. They know no engine."""

from distkit.models.fastnet import FastNet, whitening_init_
from distkit.models.generate import generate
from distkit.models.gpt import GPT, Block, GPTConfig
from distkit.models.init import dirac_init_, kaiming_init_, trunc_normal_init_, xavier_init_, zero_init_residual_
from distkit.models.resnet import NORMS, Norm, ResNet, Shortcut, Stage, resnet18, resnet_cifar

__all__ = [
    "GPT",
    "NORMS",
    "Block",
    "FastNet",
    "GPTConfig",
    "Norm",
    "ResNet",
    "Shortcut",
    "Stage",
    "dirac_init_",
    "generate",
    "kaiming_init_",
    "resnet18",
    "resnet_cifar",
    "trunc_normal_init_",
    "whitening_init_",
    "xavier_init_",
    "zero_init_residual_",
]
