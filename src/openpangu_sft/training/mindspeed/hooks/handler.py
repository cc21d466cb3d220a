"""The handler of the published preprocessing command; it writes the same bytes as stage preprocess.

Run as, in MindSpeed-LLM's folder: python preprocess_data.py --input samples/ --output-prefix dataset/data --pack
    --handler-name PanguInstructionHandler --tokenizer-type PretrainedFromHF --tokenizer-name-or-path hf/
    --seq-length 32768 --workers 4
"""

from __future__ import annotations

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from openpangu_sft.artifacts.artifact import only_one_run
from openpangu_sft.artifacts.atomic import sync_directory
from openpangu_sft.artifacts.checks import stamps_of, unchanged
from openpangu_sft.dataset.index_file import FIELDS, field_path
from openpangu_sft.dataset.preprocess import open_tokenizer, sample_files
from openpangu_sft.dataset.shard import write_shard
from openpangu_sft.dataset.spans import Span
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.remote_code import YES
from openpangu_sft.training.mindspeed.hooks import one_line
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError, naming

FIXED: dict[str, object] = {"append_eod": False, "split_sentences": False, "streaming": False, "n_subs": 1}
FIXED |= {"hf_datasets_params": None, "map_keys": None, "max_samples": None}
"""Flags of preprocess_data.py that this handler does not support, and their defaults."""


class PanguInstructionHandler:
    """openPangu conversations to packs: one dataset of all samples files of the input."""

    def __init__(self, args: Namespace, raw_datasets: list[Path], tokenizer: object, splitter: object) -> None:
        self._args, self._files = args, raw_datasets  # from `inputs`; upstream's tokenizer may be of the fast class
        prefix = Path(args.output_prefix)
        self._directory, self._prefix = prefix.parent, prefix.name
        paths = {field: field_path(self._directory, self._prefix, field, "idx") for field in FIELDS}
        self.output_idx_files = {field: str(path) for field, path in paths.items()}

    @staticmethod
    def inputs(args: Namespace) -> list[Path]:
        """The samples files, instead of a loaded dataset, which has lost its line numbers."""
        with one_line():
            _settings(args)
            return sample_files(Path(args.input))

    def serialize_to_disk(self, iteration_batch_size: int = 50) -> None:
        """Writes the six files, or one line with the reason why not."""
        with one_line("make preprocess"):
            spans = [Span(file, 0, file.stat().st_size) for file in self._files]
            data = _settings(self._args)
            os.environ[YES] = "1"  # upstream has run its code already
            tokenizer = open_tokenizer(Path(self._args.tokenizer_name_or_path), True, spans, data)
            with _in_place(self._directory, self._prefix) as staging, unchanged(stamps_of(self._files)):
                counts = write_shard(data, tokenizer, spans, staging, self._prefix)
        say(f"{counts['packed']:,} samples in {counts['packs']:,} packs: {self._args.output_prefix}_packed_…")


def _settings(args: Namespace) -> Data:
    """The recipe's data section that the flags stand for; `UserError` for one that is missing or not supported."""
    if not args.pack:
        what = "is missing: every sample would be a row of its own, but training takes packs"
        raise UserError(what, where="--pack", remedy="add --pack")
    if args.seq_length is None:
        raise UserError("is missing", where="--seq-length", remedy="give the same value as in training")
    if args.output_prefix.endswith("/"):
        raise UserError("is a directory", where=args.output_prefix, remedy="add the prefix of the file names")
    for name, value in FIXED.items():
        if getattr(args, name, value) != value:
            what = "is not supported by PanguInstructionHandler"
            raise UserError(what, where=f"--{name.replace('_', '-')}", remedy="leave it out")
    try:
        return Data(seq_length=args.seq_length, workers=args.workers, seed=args.seed)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        flag = f"--{str(detail['loc'][0]).replace('_', '-')} {detail['input']}"
        raise UserError(detail["msg"], where=flag, remedy="give another value") from None


@contextlib.contextmanager
def _in_place(directory: Path, prefix: str) -> Iterator[Path]:
    """Yields a staging directory; moves its files into place if the block succeeds.

    If killed, the earlier files stay, or at most a dataset without an index, which cannot be read.
    """
    staging = directory / f".{prefix}_packed.staging"
    with naming(staging), only_one_run(directory / f"{prefix}_packed"):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            names = [field_path(Path(), prefix, field, suffix) for suffix in ("bin", "idx") for field in FIELDS]
            for name in names:
                with (staging / name).open("rb") as stream:
                    os.fsync(stream.fileno())
            for name in names[len(FIELDS) :]:
                (directory / name).unlink(missing_ok=True)
            for name in names:
                (staging / name).replace(directory / name)
            sync_directory(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
