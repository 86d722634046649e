"""What tensor names and config.json tell of a model: layer stacks, roles, config surgery."""

from .config import Conflict, config_conflicts, output_config
from .layers import LayerPlace, LayerStack, LayerStacks, find_layer_stacks
from .roles import Role, is_optional, is_vocabulary, tensor_role

__all__ = [
    "Conflict",
    "LayerPlace",
    "LayerStack",
    "LayerStacks",
    "Role",
    "config_conflicts",
    "find_layer_stacks",
    "is_optional",
    "is_vocabulary",
    "output_config",
    "tensor_role",
]
