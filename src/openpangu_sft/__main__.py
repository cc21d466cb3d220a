"""Run as: python -m openpangu_sft STAGE --recipe recipes/demo.yaml"""

import os

from openpangu_sft.util.signals import interrupt_on_signals

if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's workers may wait in C++ for one that is gone: they just end
    interrupt_on_signals()  # before imports that take seconds

from openpangu_sft.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
