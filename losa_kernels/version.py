"""The one version number, of both packages and of the native libraries."""

__version__ = "0.1.0"
