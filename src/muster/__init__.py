"""muster: train and serve large language models on whatever machines you can muster.

The command line (`muster --help`) is the public interface; the packages below follow
the house drawn in ARCHITECTURE.md. Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
