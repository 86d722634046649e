"""LoRA adapters: model references `model+adapter`, and what an adapter changes of which tensor."""

from .opening import open_model, split_reference

__all__ = ["open_model", "split_reference"]
