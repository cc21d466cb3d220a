"""The recipe: the published values, and one line for whatever cannot be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from openpangu_sft.recipe.load import SYNONYMS, _all_keys, load_recipe
from openpangu_sft.recipe.reference import reference
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError
from parameter_ids import named_by
from refusals import refusal_of

OPENPANGU, DEMO = ROOT / "recipes/openpangu-1b.yaml", ROOT / "recipes/demo.yaml"

# Written down from the published recipe: its training script, and its commands for data and conversion.
PUBLISHED = {
    "model.num_layers": 26,
    "model.hidden_size": 1536,
    "model.ffn_hidden_size": 6144,
    "model.num_attention_heads": 12,
    "model.num_query_groups": 6,
    "model.kv_channels": 128,
    "model.vocab_size": 153376,
    "model.max_position_embeddings": 32768,
    "model.rotary_base": 4e6,
    "model.norm_epsilon": 1e-5,
    "model.normalization": "RMSNorm",
    "model.activation": "swiglu",
    "model.add_qkv_bias": True,
    "model.add_dense_bias": True,
    "model.tie_word_embeddings": True,
    "tokenizer.trust_remote_code": True,
    "data.seq_length": 32768,
    "data.workers": 4,
    "data.on_bad_sample": "refuse",
    "parallel.nodes": 1,
    "parallel.devices_per_node": 8,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.context": 2,
    "train.engine": "mindspeed",
    "train.precision": "bf16",
    "train.micro_batch_size": 1,
    "train.global_batch_size": 128,
    "train.iterations": 600,
    "train.lr": 2e-5,
    "train.min_lr": 2e-6,
    "train.lr_decay_style": "cosine",
    "train.lr_warmup_iterations": 200,
    "train.weight_decay": 0.1,
    "train.clip_grad": 1.0,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.95,
    "train.adam_eps": 1e-8,  # Megatron-LM's default, which the script leaves as it is
    "train.seed": 1234,
    "train.save_interval": 100,
    "train.recompute": {"granularity": "full", "method": "block", "num_layers": 26, "activation": False},
}


def value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump()
    for part in key.split("."):
        value = value[part]
    return value


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text, "utf-8")
    return path


def edited(tmp_path: Path, before: str, after: str) -> Path:
    """The published recipe with one text in it replaced."""
    text = OPENPANGU.read_text("utf-8")
    assert text.count(before) == 1
    return recipe_file(tmp_path, text.replace(before, after))


def line_of(path: Path, text: str) -> int:
    """Number of the only line that begins so."""
    [number] = [n for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.lstrip().startswith(text)]
    return number


@pytest.mark.parametrize("key", PUBLISHED)
def test_openpangu_recipe_holds_the_published_value(key: str) -> None:
    assert value_of(load_recipe(OPENPANGU), key) == PUBLISHED[key]


def test_openpangu_recipe_derives_the_published_parallelism() -> None:
    parallel = load_recipe(OPENPANGU).parallel
    assert (parallel.world, parallel.data) == (8, 4)


def test_openpangu_paths_are_below_cache_and_no_two_stages_share_one() -> None:
    recipe = load_recipe(OPENPANGU)
    names = [name for name in type(recipe.paths).model_fields if name != "cache"]
    paths = [recipe.path(name) for name in names]
    assert all(Path("/cache") in path.parents for path in paths)
    for one in paths:
        assert [other for other in paths if one == other or one in other.parents] == [one]


def test_demo_recipe_loads_and_needs_no_device() -> None:
    recipe = load_recipe(DEMO)
    assert (recipe.train.engine, recipe.train.device, recipe.parallel.world) == ("transformers", "auto", 1)
    assert not recipe.tokenizer.trust_remote_code


def test_paths_relative_absolute_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(DEMO, ["paths.cache=~/cache", "paths.raw=/data/raw", "paths.hf=~/hf"])
    found = [str(recipe.path(name)) for name in ("samples", "raw", "hf")]
    assert found == ["/home/me/cache/dataset", "/data/raw", "/home/me/hf"]


# --- what the file may look like ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "at", "said"),
    named_by(
        1,
        (
            "  seq_length: 32768",
            "  seq_lenght: 32768",
            "seq_lenght: 32768",
            "unknown key data.seq_lenght -> did you mean data.seq_length?",
        ),
        (
            "    granularity: full",
            "    granularty: full",
            "granularty: full",
            "did you mean train.recompute.granularity?",
        ),
        ("chat:\n", "chatt:\n", "chatt:", "unknown key chatt -> did you mean chat?"),
        ("chat:\n", "lr: 1.0e-5\nchat:\n", "lr: 1.0e-5", "unknown key lr -> did you mean train.lr?"),
        (
            "chat:\n",
            "xyzzy: 1\nchat:\n",
            "xyzzy: 1",
            "unknown key xyzzy -> known here: chat, data, model, parallel, paths",
        ),
        ("lr: 2.0e-5", "lr: fast", "lr: fast", "train.lr = 'fast': Input should be a valid number"),
        (
            "iterations: 600",
            "iterations: 600.0",
            "iterations: 600.0",
            "train.iterations = 600.0: Input should be a valid integer",
        ),
        (
            "iterations: 600",
            "iterations: '600'",
            "iterations: '600'",
            "train.iterations = '600': Input should be a valid integer",
        ),
        (
            "iterations: 600",
            "iterations: true",
            "iterations: true",
            "train.iterations = True: Input should be a valid integer",
        ),
        ("iterations: 600", "iterations: 0", "iterations: 0", "train.iterations and train.epochs are 0 -> give one"),
        ("iterations: 600", "iterations:", "iterations:", "train.iterations = None: Input should be a valid integer"),
        (
            "clip_grad: 1.0",
            "clip_grad: .inf",
            "clip_grad: .inf",
            "train.clip_grad = inf: Input should be a finite number",
        ),
        (
            "add_qkv_bias: true",
            "add_qkv_bias: 1",
            "add_qkv_bias: 1",
            "model.add_qkv_bias = 1: Input should be a valid boolean",
        ),
        (
            "add_qkv_bias: true",
            "add_qkv_bias: yes",
            "add_qkv_bias: yes",
            "model.add_qkv_bias = 'yes': Input should be a valid boolean",
        ),
        ("raw: raw ", "raw: 7 ", "raw: 7", "paths.raw = 7: Input should be a valid string"),
        ("raw: raw ", "raw: '' ", "raw: ''", "paths.raw '' is not a path -> write one"),
        ("on_bad_sample: refuse", "on_bad_sample: drop", "on_bad_sample: drop", "Input should be 'refuse' or 'skip'"),
        ("  save_interval: 100\n", "", "train:", "key train.save_interval is missing -> add it"),
        ("  seed: 1234\n  workers", "  seed: 4294967296\n  workers", "seed: 4294967296", "data.seed = 4294967296"),
        (
            "min_lr: 2.0e-6",
            "min_lr: 2.0e-3",
            "min_lr: 2.0e-3",
            "train.min_lr 0.002 is above train.lr 2e-05 -> lower train.min_lr",
        ),
        (
            "chat:\n",
            "  device_tflops: 1e308\nchat:\n",
            "device_tflops",
            "train.device_tflops = 1e+308: Input should be less",
        ),
        ("chat:\n", "7: 8\nchat:\n", "7: 8", "7 = 7: Keys should be strings"),
    ),
)
def test_a_wrong_setting_is_named_with_its_line(tmp_path: Path, before: str, after: str, at: str, said: str) -> None:
    path = edited(tmp_path, before, after)
    line = line_of(path, at)
    message = refusal_of(load_recipe, path)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message


def test_a_section_that_is_none(tmp_path: Path) -> None:
    before = OPENPANGU.read_text("utf-8").split("chat:\n")[0]
    path = recipe_file(tmp_path, before + "chat: 5\n")
    said = f"{path}:{line_of(path, 'chat')}: chat = 5: Input should be a valid dictionary or instance of Chat"
    assert refusal_of(load_recipe, path).startswith(said)
    assert refusal_of(load_recipe, path, ["chat.top_p=1"]).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    named_by(
        0,
        (b"", "holds no settings"),
        (b"# nothing\n", "holds no settings"),
        (b"- a\n- b\n", "holds no settings"),
        (b"just words\n", "holds no settings"),
        (b"model:\n\tnum_layers: 2\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
        (b"model: {num_layers: 2\n", ":2: not valid YAML: expected ',' or '}'"),
        (b"chat:\n  top_p: 1\n  top_p: 0.5\n", ':3: not valid YAML: found duplicate key "top_p"'),
        (b"chat: 1\nchat: 2\n", ':2: not valid YAML: found duplicate key "chat"'),
        (b"model: *base\n", ":1: not valid YAML: found undefined alias"),
        (b"model: 1\n---\nmodel: 2\n", ":2: not valid YAML: but found another document"),
        (b"model: !!python/object:os.system x\n", ":1: not valid YAML: could not determine a constructor"),
        (b"chat: 2024-99-99\n", "not valid YAML: month must be in 1..12"),
        (b"chat: " + b"[" * 5000, "not valid YAML: nested too deeply"),
        ("# 说明\nmodel: 模型\n".encode("gb18030"), ":1: not UTF-8: byte 0xc3 -> save the file as UTF-8"),
        (b"chat: 1\nmodel: \xff\n", ":2: not UTF-8: byte 0xff"),
        (b"\xef\xbb\xbfchat: 1\nmodel: \xff\n", ":2: not UTF-8: byte 0xff"),
        (b"model: \x00\n", "not valid YAML: unacceptable character #x0000"),
    ),
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    message = refusal_of(load_recipe, path)
    assert message.startswith(str(path))
    assert said in message


@pytest.mark.parametrize("path", [Path("/nowhere/a.yaml"), ROOT, Path("a\0b.yaml")])
def test_no_file(path: Path) -> None:
    assert "no such recipe file -> give one with RECIPE=…" in refusal_of(load_recipe, path)


def test_byte_order_mark_and_crlf_are_let_pass(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + OPENPANGU.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(path) == load_recipe(OPENPANGU)


def test_anchors_aliases_and_merge_keys(tmp_path: Path) -> None:
    text = OPENPANGU.read_text("utf-8")
    text = text.replace("add_qkv_bias: true", "add_qkv_bias: &yes true").replace("tie_word_embeddings: true", "")
    text = text.replace(
        "add_dense_bias: true", "add_dense_bias: *yes\n  <<: {tie_word_embeddings: *yes, hidden_size: 9}"
    )
    text = text.replace("engine: mindspeed", "engine: &engine mindspeed").replace(
        "seed: 1234\n  work", "seed: &s 7\n  work"
    )
    text = text.replace("seed: 1234\n  save", "seed: *s\n  save").replace("  lr: 2.0e-5", "  lr: &lr 2e-5")
    recipe = load_recipe(recipe_file(tmp_path, text))
    assert recipe.model == load_recipe(OPENPANGU).model
    assert (recipe.data.seed, recipe.train.seed, recipe.train.lr) == (7, 7, 2e-5)


def test_an_override_stays_in_its_section_where_two_share_an_anchor(tmp_path: Path) -> None:
    text = DEMO.read_text("utf-8").replace("chat:\n  max_new_tokens: 64", "chat: &empty {}\ntokenizer: *empty")
    recipe = load_recipe(recipe_file(tmp_path, text), ["chat.max_new_tokens=5"])
    assert recipe.chat.max_new_tokens == 5


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    text = DEMO.read_text("utf-8").replace("chat:\n  max_new_tokens: 64", "chat:")
    recipe = load_recipe(
        recipe_file(tmp_path, text.replace("  save_interval: 80", "  save_interval: 80\n  recompute:"))
    )
    assert (recipe.chat.max_new_tokens, recipe.train.recompute.granularity) == (512, "none")


# --- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-5", 1e-5),
        ("train.lr=1E-5", 1e-5),
        ("train.lr=.00003", 3e-5),
        (" train.lr = 3.0e-6 ", 3e-6),
        ("train.weight_decay=0", 0.0),
        ("train.iterations=1_000", 1000),
        ("train.recompute.granularity=none", "none"),
        ("train.recompute.num_layers=3", 3),
        ("model.add_qkv_bias=false", False),
        ("tokenizer.trust_remote_code=False", False),
        ("chat.top_p=0.5", 0.5),
        ("paths.raw=a=b", "a=b"),
        ("paths.raw==", "="),
        ("paths.raw=/data/#1: x", "/data/#1: x"),
        ("paths.raw=123", "123"),
        ("paths.raw=true", "true"),
        ("paths.raw=数据 [一]", "数据 [一]"),
        ("paths.raw='a b'", "a b"),
        ('paths.raw="a b"', "a b"),
    ],
)
def test_override(override: str, value: object) -> None:
    found = value_of(load_recipe(OPENPANGU, [override]), override.split("=")[0].strip())
    assert found == value
    assert type(found) is type(value)


def test_override_of_a_section_that_the_file_has_not_and_the_last_one_counts() -> None:
    assert "tokenizer" not in DEMO.read_text("utf-8")
    overrides = ["tokenizer.trust_remote_code=true", "train.recompute.granularity=full", "train.recompute.num_layers=1"]
    recipe = load_recipe(DEMO, [*overrides, "train.recompute.num_layers=2"])
    assert recipe.tokenizer.trust_remote_code
    assert recipe.train.recompute.num_layers == 2


@pytest.mark.parametrize(
    ("override", "said"),
    named_by(
        0,
        ("train.lr", "override 'train.lr' is not of the form key=value -> write e.g. train.lr=1e-5"),
        ("=1", "override '=1' is not of the form"),
        ("", "override '' is not of the form"),
        ("train.lr=", "--set train.lr: train.lr = None: Input should be a valid number"),
        ("train.lr=[1, 2]", "--set train.lr: train.lr = [1, 2]: Input should be a valid number"),
        ("train.lr=fast", "--set train.lr: train.lr = 'fast'"),
        ("train.lr=[1", "--set train.lr: value '[1' is not valid YAML"),
        ("train.lr=!!int x", "is not valid YAML: invalid literal for int()"),
        ("train.seed=" + "9" * 9999, "train.seed"),
        ("paths.raw=", "--set paths.raw: paths.raw '' is not a path -> write one"),
        ("paths.raw='", '--set paths.raw: value "\'" is not valid YAML'),
        ("paths.raw='7", "is not valid YAML"),
        ('paths.raw="\\udc80"', "--set paths.raw: paths.raw = '\\udc80': Value error, 'utf-8' codec can't encode"),
        ('data.ignore_keys=["\\ud800"]', "surrogates not allowed -> see docs/recipe.md"),
        ('data.columns={"prompt": "\\ud800"}', "surrogates not allowed"),
        ('data.sources=[{"path": a, "system": "\\ud800"}]', "data.sources.0.system = '\\ud800': Value error"),
        (
            'data.sources=[{"path": a, "system": "<s>"}]',
            "data.sources[0].system holds the control token <s> ->",
        ),
        ("paths.raw=a\0b", "--set paths.raw: paths.raw 'a\\x00b' is not a path"),
        ("paths.raw=~nobody-here/x", "begins with an unknown home directory -> write it out"),
        ("train=", "--set train: train is a section -> set its keys one by one: train.engine=…"),
        ("train={lr: 1}", "--set train: train is a section"),
        ("train.recompute={num_layers: 1}", "--set train.recompute: train.recompute is a section"),
        ("train.lr.x=1", "--set train.lr.x: train.lr is one value and has no keys below it -> set train.lr=…"),
        ("train.iteratons=9", "--set train.iteratons: unknown key train.iteratons -> did you mean train.iterations?"),
        ("trian.lr=9", "--set trian.lr: unknown key trian -> did you mean train?"),
        ("lr=9", "--set lr: unknown key lr -> did you mean train.lr?"),
        ("num_layers=9", "did you mean model.num_layers?"),
        ("learning_rate=9", "--set learning_rate: unknown key learning_rate -> did you mean train.lr?"),
        ("train.num_train_epochs=3", "train.num_train_epochs -> did you mean train.epochs?"),
        ("data.cutoff_len=9", "did you mean data.seq_length?"),
        ("train..lr=9", "unknown key train."),
        ("train.recompute.=9", "unknown key train.recompute."),
    ),
)
def test_override_that_cannot_be(override: str, said: str) -> None:
    assert said in refusal_of(load_recipe, OPENPANGU, [override])


def test_synonyms_lead_to_keys() -> None:
    keys = set(_all_keys(Recipe))
    lines = [line.split() for line in SYNONYMS.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert {line[1] for line in lines} <= keys
    assert len({line[0] for line in lines}) == len(lines)
    asked = {"learning_rate", "lr", "num_train_epochs", "cutoff_len", "model_name_or_path", "warmup_ratio"}
    assert asked | {"per_device_train_batch_size", "gradient_accumulation_steps"} <= {line[0] for line in lines}
    leaves = {key.rpartition(".")[2] for key in keys}
    assert not [name for name, key, *_ in lines if name in leaves and not key.endswith(f".{name}")]


# --- settings that cannot work together --------------------------------------------------------------------------

TRANSFORMERS = ("train.engine=transformers", "parallel.context=1")

RULES: list[tuple[tuple[str, ...], str]] = [
    (("parallel.tensor=4",), "model.num_query_groups 6 is not a multiple of parallel.tensor 4 -> change one of them"),
    (
        ("parallel.tensor=2", "model.ffn_hidden_size=6145"),
        "model.ffn_hidden_size 6145 is not a multiple of parallel.tensor 2 -> change one of them",
    ),
    (
        ("parallel.pipeline=4",),
        "model.num_layers 26 is not a multiple of parallel.pipeline 4 -> change one of them, or give "
        "parallel.num_layer_list",
    ),
    *(
        (
            ("parallel.pipeline=2", f"parallel.num_layer_list={given}"),
            f"parallel.num_layer_list {given} does not spread model.num_layers 26 over parallel.pipeline 2 -> give 2 "
            "numbers above 0 that add up to 26",
        )
        for given in ([26], [14, 13], [26, 0], [13, 12, 1], [])
    ),
    (
        ("parallel.devices_per_node=5",),
        "parallel.nodes x parallel.devices_per_node 5 is not a multiple of parallel.tensor x parallel.pipeline x "
        "parallel.context 2 -> change one of them",
    ),
    (
        ("parallel.devices_per_node=1",),
        "parallel.nodes x parallel.devices_per_node 1 is not a multiple of parallel.tensor x parallel.pipeline x",
    ),
    (("data.seq_length=32767",), "data.seq_length 32767 is not a multiple of parallel.context 2 -> change one of them"),
    (
        ("parallel.context=8",),
        "model.num_attention_heads 12 is not a multiple of parallel.tensor x parallel.context 8 -> change one of them",
    ),
    (
        ("train.global_batch_size=126",),
        "train.global_batch_size 126 is not a multiple of train.micro_batch_size x data-parallel replicas 4 -> change",
    ),
    (
        (*TRANSFORMERS, "train.micro_batch_size=3"),
        "train.global_batch_size 128 is not a multiple of train.micro_batch_size x data-parallel replicas 24",
    ),
    (
        ("data.seq_length=65536",),
        "data.seq_length 65536 is above model.max_position_embeddings 32768 -> lower data.seq_length",
    ),
    (
        ("train.recompute.num_layers=27",),
        "train.recompute.num_layers 27 is above model.num_layers 26 -> lower train.recompute.num_layers",
    ),
    (
        ("train.recompute.num_layers=0",),
        "train.recompute.granularity full with train.recompute.num_layers 0 recomputes nothing -> set",
    ),
    (
        ("train.engine=transformers",),
        "parallel.tensor 1, parallel.pipeline 1, parallel.context 2: train.engine transformers is data parallel only "
        "-> set all three to 1",
    ),
    (
        (*TRANSFORMERS, "train.recompute.activation=true"),
        "train.recompute.activation is for train.engine mindspeed -> set it to false",
    ),
    (("train.min_lr=1",), "train.min_lr 1.0 is above train.lr 2e-05 -> lower train.min_lr"),
    (
        ("train.lr_warmup_iterations=600",),
        "a warm-up of 600 iterations leaves too few of train.iterations 600 -> lower the warm-up",
    ),
    (
        ("model.num_query_groups=5",),
        "model.num_attention_heads 12 is not a multiple of model.num_query_groups 5 -> change one of them",
    ),
    (("model.kv_channels=127",), "model.kv_channels 127 is odd"),
    (
        ("paths.run=./ckpts//pangu_model_mcore",),
        "paths.run /cache/ckpts/pangu_model_mcore is paths.mcore /cache/ckpts/pangu_model_mcore: making one would "
        "remove the other -> give paths.run a directory of its own",
    ),
    (("paths.export=ckpts/pangu_model",), "paths.export /cache/ckpts/pangu_model is paths.hf"),
    (("paths.shards=dataset/shards",), "paths.shards /cache/dataset/shards lies in paths.samples /cache/dataset"),
    (("paths.hf=export/base",), "paths.hf /cache/export/base lies in paths.export /cache/export"),
]


@pytest.mark.parametrize(("overrides", "said"), named_by(0, *RULES))
def test_settings_that_cannot_work_together(overrides: tuple[str, ...], said: str) -> None:
    message = refusal_of(load_recipe, OPENPANGU, overrides)
    assert said in message
    assert message.startswith(str(OPENPANGU))  # the other setting of the pair stands there


def test_a_rule_blames_only_the_overrides_it_speaks_of() -> None:
    message = refusal_of(load_recipe, OPENPANGU, ["train.seed=1", "chat.top_p=0.3", "train.lr=1e-9", "paths.raw=x"])
    assert message.startswith(
        f"{OPENPANGU}:{line_of(OPENPANGU, 'min_lr')} --set train.lr: train.min_lr 2e-06 is above train.lr 1e-09"
    )


def test_a_rule_blames_the_overrides_that_its_figures_follow_from() -> None:
    message = refusal_of(load_recipe, OPENPANGU, ["parallel.devices_per_node=1000", "train.lr=1e-5"])
    where = f"{OPENPANGU}:{line_of(OPENPANGU, 'global_batch_size')} --set parallel.devices_per_node: "
    assert message.startswith(f"{where}train.global_batch_size 128 is not a multiple of ")


def test_a_rule_points_at_what_stands_in_the_file_and_not_at_what_was_overridden() -> None:
    message = refusal_of(load_recipe, OPENPANGU, ["data.seq_length=65536"])
    line = line_of(OPENPANGU, "max_position_embeddings")
    assert message.startswith(f"{OPENPANGU}:{line} --set data.seq_length: data.seq_length 65536 is above")


def test_a_type_error_points_at_the_override_or_the_line_it_comes_from(tmp_path: Path) -> None:
    path = edited(tmp_path, "clip_grad: 1.0", "clip_grad: none")
    assert refusal_of(load_recipe, path, ["train.lr=1e-6"]).startswith(
        f"{path}:{line_of(path, 'clip_grad')}: train.clip_grad = 'none'"
    )
    assert refusal_of(load_recipe, path, ["train.lr=x", "train.clip_grad=1"]).startswith(
        "--set train.lr: train.lr = 'x'"
    )


@pytest.mark.parametrize(
    "key",
    [
        "model.num_layers",
        "model.num_attention_heads",
        "parallel.nodes",
        "parallel.devices_per_node",
        "train.micro_batch_size",
        "parallel.make_vocab_size_divisible_by",
    ],
)
def test_sizes_that_would_take_hours_and_all_memory_to_look_at(key: str) -> None:
    assert f"{key} = 1000000: Input should be less than or equal to 100" in refusal_of(
        load_recipe, OPENPANGU, [f"{key}=1000000"]
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.tensor=2",),
        ("parallel.pipeline=2",),
        ("parallel.tensor=2", "parallel.pipeline=2"),
        ("parallel.context=4",),
        ("parallel.context=1",),
        ("parallel.nodes=4",),
        ("parallel.nodes=3", "train.global_batch_size=12"),
        ("train.recompute.granularity=none",),  # its num_layers are idle then
        ("train.lr_warmup_iterations=0",),
        ("train.lr_warmup_iterations=599",),
        ("train.min_lr=2e-5",),
        ("train.min_lr=0",),
        ("data.seq_length=8",),
        (*TRANSFORMERS, "train.micro_batch_size=2"),
        (*TRANSFORMERS, "train.device=cpu", "parallel.devices_per_node=2"),
        ("paths.samples=raw",),  # samples that need no `make format`
        ("paths.samples=raw/mine.jsonl",),
    ],
)
def test_settings_that_do_work_together(overrides: tuple[str, ...]) -> None:
    load_recipe(OPENPANGU, overrides)


# --- whatever is typed -------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *PUBLISHED,
        *(f"paths.{name}" for name in ("cache", "raw", "samples", "run")),
        "train",
        "chat.top_p",
        "chat.x",
        "x",
    ]
)
VALUES = st.one_of(
    st.text(max_size=12),
    st.text("0123456789.-+eE_:{}[],&*!|>%@#'\" xnull~", max_size=10),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "null", "{}", "[]", "&a [*a]", "!!float abc", "!!bool x", "!!int ''", "<<: x", "2024-13-01"]
    ),
)


def one_line(message: str) -> str:
    assert "\n" not in message
    return message


def recipe_or_refusal(path: Path, overrides: list[str]) -> object:
    try:
        return load_recipe(path, overrides)
    except UserError as error:
        return one_line(str(error))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.tuples(KEYS, VALUES).map("=".join), st.text(max_size=15)), max_size=3))
@example(["train.lr=\ud800"])
@example(["paths.raw=~\0"])
@example(["train.seed=!<tag:yaml.org,2002:int> ''"])
def test_random_overrides_give_a_recipe_or_one_line(overrides: list[str]) -> None:
    recipe = recipe_or_refusal(DEMO, overrides)
    if isinstance(recipe, Recipe):
        assert all(recipe.path(name).is_absolute() for name in type(recipe.paths).model_fields)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_files_give_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lines = DEMO.read_text("utf-8").splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(lines) - 1))
        lines[where] = lines[where][: data.draw(st.integers(0, 20))] + data.draw(st.one_of(st.text(max_size=8), VALUES))
    path = tmp_path_factory.mktemp("recipe") / "own.yaml"
    path.write_text("\n".join(lines), "utf-8", "replace")
    recipe_or_refusal(path, [])


def test_the_reference_in_the_docs_is_that_of_the_code() -> None:
    page = (ROOT / "docs/recipe.md").read_text("utf-8")
    assert page == reference(), "run: python -m openpangu_sft.recipe.reference > docs/recipe.md"


def test_every_key_is_described() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.endswith("|  |")]
