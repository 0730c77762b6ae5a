"""Nodes of `dicode` for ComfyUI, which finds `comfy_entrypoint` here."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
