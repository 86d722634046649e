"""What tensor names and config.json tell of a model: layer stacks, roles, config surgery."""

from .layers import LayerPlace, LayerStack, LayerStacks, find_layer_stacks
from .roles import Role, is_optional, is_vocabulary, tensor_role

__all__ = [
    "LayerPlace",
    "LayerStack",
    "LayerStacks",
    "Role",
    "find_layer_stacks",
    "is_optional",
    "is_vocabulary",
    "tensor_role",
]
