"""Turn the feature maps of frozen vision models back into images."""

__version__ = "0.1.0"
