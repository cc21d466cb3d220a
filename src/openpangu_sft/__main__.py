"""Run as: python -m openpangu_sft STAGE --recipe recipes/demo.yaml"""

from openpangu_sft.cli.main import main

main()
