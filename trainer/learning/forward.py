"""The mode of every forward pass of PPO."""

from __future__ import annotations

from torch import nn


def run_without_dropout(model: nn.Module, *, checkpoint_activations: bool) -> None:
    """Put `model` into the mode of every forward of PPO: dropout off, also when activations are recomputed.

    transformers recomputes only layers in training mode; these get the flag for themselves alone, their dropout
    submodules stay off.

    Raises ValueError for a model that cannot recompute activations without switching dropout on.
    """
    model.eval()
    if not checkpoint_activations:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers that can recompute activations")
    for layer in layers:
        if rates := [name for name, rate in vars(layer).items() if "dropout" in name and rate]:
            raise ValueError(f"gradient_checkpointing: {type(layer).__name__} would apply {rates}; set them to 0 first")
        layer.training = True
