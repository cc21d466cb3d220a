"""Benchmarks of lm-evaluation-harness, asked in the template of training.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) has tasks, batches and metrics; prompts are ours: its
own would go through the tokenizer as one text, which gives other tokens than the spans of training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from datasets.exceptions import DatasetsError
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import load_yaml_config

from openpangu_sft.artifacts.artifact import sha256_of
from openpangu_sft.conversations.calls import THINKING
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.evaluate.record import Scores
from openpangu_sft.model.chat import Chat
from openpangu_sft.tokenizer.template import TextSpan
from openpangu_sft.util.errors import UserError

AT_ONCE = 4  # samples in a batch: the logits of one of 2,000 tokens take 1.2 GB in fp32

evaluator.get_git_commit_hash = lambda: None  # it runs git, which complains on the screen outside of a clone


class _Model(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """The harness's model class, with our token ids in the place of its texts."""

    def __init__(self, chat: Chat) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
        thinking: int = chat.tokenizer.hf.convert_tokens_to_ids(THINKING[1])
        hf = chat.tokenizer.hf
        super().__init__(
            chat.model, "causal", tokenizer=hf, max_length=chat.context, batch_size=AT_ONCE, think_end_token=thinking
        )
        self._chat, self._prompts = chat, dict[str, list[int]]()

    @property
    def eot_token_id(self) -> int:
        return self._chat.tokenizer.end_id

    def _model_generate(self, *arguments: Any, **settings: Any) -> Any:
        return super()._model_generate(*arguments, eos_token_id=self.eot_token_id, **settings)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A name for the prompt of a conversation; without the generation prompt its last message begins the answer."""
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        system = "\n".join(turn["content"] for turn in asked if turn["role"] == "system")
        messages = [Message(turn["role"], turn["content"]) for turn in asked if turn["role"] != "system"]
        prompt = self._chat.prompt(messages, system)
        if begun:
            prompt += self._chat.tokenizer.span_ids(TextSpan(begun, trained=False))
        self._chat.room(prompt)
        name = json.dumps(chat_history, ensure_ascii=False)
        self._prompts[name] = prompt
        return name

    def tok_encode(
        self, string: str, left_truncate_len: Optional[int] = None, add_special_tokens: Optional[bool] = None
    ) -> list[int]:
        """The ids of a prompt by its name, or of an answer."""
        return self._prompts.get(string) or self._chat.tokenizer.span_ids(TextSpan(string, trained=True))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.tok_encode(context), self.tok_encode(continuation)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: Optional[int] = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, int64 [prompts, tokens of the longest]; raises `UserError` instead of cutting a prompt."""
        prompts = list(map(self.tok_encode, strings))
        if left_truncate_len and (longest := max(map(len, prompts))) > left_truncate_len:
            what = f"a prompt has {longest:,} tokens, and the task's answers leave room for {left_truncate_len:,}"
            raise UserError(what, remedy="give the task a smaller max_gen_toks or num_fewshot")
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side=padding_side)
        return padded["input_ids"], padded["attention_mask"]


class Benchmarks:
    """Tasks by their names in the harness, or in YAML files of its form; raises `UserError` for one that is neither.

    The names that results are kept under are in `names`: a file's has the beginning of its sha256.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        files = [task for task in tasks if Path(task).is_file()]
        self._manager = TaskManager(verbosity="ERROR", include_defaults=len(files) < len(tasks))  # reads 10,000 files
        self._tasks: dict[str, Any] = {}
        for task in tasks:
            if task in files:
                self._tasks[f"{task} {sha256_of(Path(task))[:8]}"] = _task_in(task)
            elif task in self._manager.all_tasks:
                self._tasks[task] = task
            else:
                what = f"{task} is no task of lm-evaluation-harness, nor a file"
                raise UserError(what, where="BENCH", remedy="see lm-eval --tasks list")
        self.names = [*self._tasks]

    def scores(self, name: str, chat: Chat) -> Scores:
        """Asks a model one of them; raises `UserError` where its data cannot be had or a prompt does not fit."""
        try:
            found = evaluator.simple_evaluate(
                _Model(chat),
                tasks=[self._tasks[name]],
                task_manager=self._manager,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                log_samples=False,
            )
        except (OSError, ValueError, AssertionError, DatasetsError) as error:
            first_line = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UserError(
                f"cannot be run: {first_line}", where=f"BENCH={name}", remedy="see docs/evaluate.md"
            ) from None
        scores: Scores = {}
        for task, metrics in (found.get("groups") or found["results"]).items():
            for key, value in metrics.items():
                metric, _, variant = key.partition(",")  # as exact_match,strict-match
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    deviation = metrics.get(f"{metric}_stderr,{variant}")
                    label = " ".join([task, metric, variant if variant != "none" else ""]).rstrip()
                    scores[label] = [value, deviation] if isinstance(deviation, float) else [value]
        return scores


def _task_in(path: str) -> ConfigurableTask:
    try:
        return ConfigurableTask(config=load_yaml_config(path))
    except Exception as error:  # of any type: it reads the data, and may import Python files that it names
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        remedy = "write it as lm-evaluation-harness's task guide says"
        raise UserError(f"is no task: {first_line}", where=path, remedy=remedy) from None
