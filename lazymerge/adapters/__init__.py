"""LoRA adapters: model references `model+adapter`, and what an adapter changes of which tensor."""

from .opening import is_local, open_model, split_reference

__all__ = ["is_local", "open_model", "split_reference"]
