"""Text to tokens: openPangu's golden sequences, and equality with the plain Hugging Face tokenizer for any text."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, AutoTokenizer, dynamic_module_utils

from conftest import SHARED, conversation, example_texts
from openpangu_sft.conversations.conversation import BadSample, Message, Sample, parse_sample
from openpangu_sft.dataset.encode import Encoded, encode_samples, input_ids_of, labels_of
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.template import TextSpan, prompt_spans
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer, tokenizer_digest
from refusals import refusal_of

# --- a stand-in for openPangu's own tokenizer --------------------------------------------------------------------

# Ids from openPangu's tokenizer_config.json; all of them lie inside the SentencePiece vocabulary.
ADDED = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    45806: "<|User|>:",
    45813: "<|Bot|>:",
    45830: "[unused0]",
    45887: "[unused9]",
    45892: "[unused10]",
    45974: "[unused16]",
    45982: "[unused17]",
    144209: "[unused33]",
}
# Ids of ordinary pieces from known sequences; that of 工具 is not known.
PIECES = {70914: "系统", 62205: "用户", 74458: "助手", 89246: "："}
VOCABULARY = 153376

REMOTE_CODE = '''
"""A slow tokenizer class as openPangu's is described; written for this test."""
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class PanguTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file, bos_token="<s>", add_bos_token=True, **kwargs):
        self.vocab_file, self.add_bos_token = vocab_file, add_bos_token
        self.sp_model = SentencePieceProcessor(model_file=vocab_file)
        super().__init__(bos_token=bos_token, **kwargs)

    @property
    def vocab_size(self):
        return self.sp_model.get_piece_size()

    @property
    def bos_token_id(self):
        return self.sp_model.bos_id()

    def get_vocab(self):
        pieces = {self.sp_model.id_to_piece(number): number for number in range(self.vocab_size)}
        return {**pieces, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_model.decode(tokens)[1:]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return ([self.bos_token_id] if self.add_bos_token else []) + token_ids_0 + (token_ids_1 or [])
'''


def sentencepiece_model() -> bytes:
    """A BPE model of openPangu's size: fillers that no text holds, bytes, letters, and the known pieces."""
    model = sentencepiece_model_pb2.ModelProto()
    piece_types = sentencepiece_model_pb2.ModelProto.SentencePiece
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.vocab_size = VOCABULARY
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 0, 1
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    model.denormalizer_spec.SetInParent()
    ordinary = dict(PIECES)
    words = [
        *map(chr, range(33, 127)),
        *"▁系统用户助手工具，。一二三你好是的",
        "th",
        "the",
        "▁th",
        "▁the",
        "工具",
        "你好",
        "▁▁",
        "▁▁▁▁",
    ]
    ordinary.update((1000 + place, word) for place, word in enumerate(words))
    for number in range(VOCABULARY):
        piece = model.pieces.add()
        piece.score = -float(number)
        if number in ADDED:
            piece.piece, piece.type = ADDED[number], piece_types.UNKNOWN if number == 0 else piece_types.CONTROL
        elif 3 <= number < 259:
            piece.piece, piece.type = f"<0x{number - 3:02X}>", piece_types.BYTE
        elif number in ordinary:
            piece.piece = ordinary[number]
        else:
            piece.piece, piece.type = chr(0xF0000 + number % 40000) * (number // 40000 + 1), piece_types.UNUSED
    return bytes(model.SerializeToString())


def write_config(directory: Path, added: dict[int, str], **more: object) -> None:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(number): {"content": token, **plain} for number, token in added.items()},
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        **more,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.fixture(scope="module")
def pangu_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pangu")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    (directory / "tokenization_openpangu.py").write_text(REMOTE_CODE, "utf-8")
    classes = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    write_config(directory, ADDED, auto_map=classes, tokenizer_class="PanguTokenizer")
    return directory


@pytest.fixture(autouse=True, scope="module")
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into the user's cache otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


@pytest.fixture(scope="module")
def internlm_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real SentencePiece model, in which some pieces have the roles of openPangu's added tokens."""
    source = SHARED / "data/internlm_v7_sft.model"
    if not source.is_file():
        pytest.skip(f"{source} is not there: a real SentencePiece model, which is not part of this project")
    directory = tmp_path_factory.mktemp("internlm")
    shutil.copyfile(source, directory / "tokenizer.model")
    names = [name for name in ADDED.values() if name not in ("<unk>", "<s>", "</s>")]
    added = {0: "<unk>", 1: "<s>", 2: "</s>", **{100004 + place: name for place, name in enumerate(names)}}
    write_config(directory, added, tokenizer_class="LlamaTokenizer")
    return directory


FILES = {"pangu": "pangu_files", "llama": "tiny_hf", "internlm": "internlm_files"}


@pytest.fixture(scope="module", params=[*FILES, *(f"{name} direct" for name in FILES)])
def tokenizer(request: pytest.FixtureRequest, own_module_cache: None) -> Tokenizer:
    """A tokenizer as the class has it, or going to SentencePiece directly."""
    name, *direct = request.param.split()
    opened = Tokenizer(request.getfixturevalue(FILES[name]), trust_remote_code=True)
    if direct:
        assert opened.go_direct([]) == ""
    return opened


def plain(tokenizer: Tokenizer) -> Any:
    """The Hugging Face tokenizer of the same files, untouched by ours."""
    files = str(tokenizer.directory)
    return AutoTokenizer.from_pretrained(files, use_fast=False, trust_remote_code=True, local_files_only=True)


# --- known sequences ---------------------------------------------------------------------------------------------


def test_golden_sequences(pangu_files: Path) -> None:
    tokenizer = Tokenizer(pangu_files, trust_remote_code=True)
    assert len(tokenizer) == VOCABULARY
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (45887, 45892, 0)
    spans = [*prompt_spans(("",), (Message("user", ""),), reply=True)]
    assert [tokenizer.span_ids(span) for span in spans] == [
        [1, 45887, 70914, 89246, 45892],
        [45887, 62205, 89246, 45892],
        [45887, 74458, 89246],
    ]
    first = TextSpan("[unused9]系统：[unused10][unused9]用户：", trained=False, opens=True)
    assert tokenizer.span_ids(first) == [1, 45887, 70914, 89246, 45892, 45887, 62205, 89246]


def test_only_answers_and_their_ends_are_trained(pangu_files: Path) -> None:
    tokenizer = Tokenizer(pangu_files, trust_remote_code=True)
    encoded = encode(tokenizer, parse_sample(conversation("你好", "a", "是", "a")))
    assert isinstance(encoded, Encoded)
    answer = tokenizer.hf.encode("a", add_special_tokens=False)
    input_ids, labels = input_ids_of(encoded.marked).tolist(), labels_of(encoded.marked).tolist()
    assert [label for label in labels if label != IGNORED] == [*answer, 45892, *answer, 45892]
    assert all(label in (IGNORED, token) for token, label in zip(input_ids, labels))
    for place in (place for place, label in enumerate(labels) if label != IGNORED):
        header = input_ids[:place][-4:]
        assert 74458 in header  # 助手: never behind the user's header
    assert encoded.marked.dtype == input_ids_of(encoded.marked).dtype == labels_of(encoded.marked).dtype == "int32"


def encode(tokenizer: Tokenizer, sample: Sample, control_tokens: str = "refuse") -> Any:
    [outcome] = encode_samples(
        [sample], tokenizer, Data(seed=1, workers=1, seq_length=999, control_tokens=control_tokens)
    )
    return outcome


def test_ids_are_those_of_the_plain_tokenizer_on_real_texts(tokenizer: Tokenizer) -> None:
    """The examples', and of real conversations where they are beside the repository."""
    reference, texts = plain(tokenizer), example_texts()
    for file in sorted((SHARED / "data").glob("*demo.json")):
        texts += list(texts_in(json.loads(file.read_text("utf-8"))))[::37]
    assert len(texts) > 100
    for text in texts:
        expected = reference.encode(text + "[unused10]", add_special_tokens=False)
        assert tokenizer.encode([TextSpan(text + "[unused10]", trained=True)]) == [expected]


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


# --- equality for any text ---------------------------------------------------------------------------------------

CHUNK = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [*ADDED.values(), " ", "    ", "\n\n", "▁", "the", " the", "你好", "[unused", "unused9]", "[unused10", "\0"]
    ),
    st.sampled_from(["a", " ", "好", "\u3000", "[unused9]", "\U0001f600", "\u0301"]).map(lambda text: text * 70),
)
TEXT = st.lists(CHUNK, max_size=5).map("".join)
CLEAN = st.lists(CHUNK.filter(lambda text: not any(token in text for token in ADDED.values())), max_size=5).map("".join)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans()), max_size=5))
@example([("", True), ("", False)])
@example([(" a", True), (" a", True)])
@example([("[unused9]助手：", False), ("[unused9]助手：", True)])
@example([("a" * 30_000, True), ("[unused9]用户：" + "好" * 10_000 + "[unused10]", False), (" " * 30_000, True)])
@example([("[unused9]用户：<s[unused10]", False), ("[unused[unused10]", True), ("[unused9][unused10]", False)])
@example([("[unused10]", True), ("[unused9]a", True), ("a[unused10]", True), ("[unused9]\0[unused10]", True)])
def test_encode_equals_the_published_way(tokenizer: Tokenizer, parts: list[tuple[str, bool]]) -> None:
    spans = [TextSpan(text, trained, opens=not place) for place, (text, trained) in enumerate(parts)]
    expected = [
        reference(tokenizer).encode(text, add_special_tokens=not place) for place, (text, _) in enumerate(parts)
    ]
    assert tokenizer.encode(spans) == expected


_references: dict[Path, Any] = {}


def reference(tokenizer: Tokenizer) -> Any:
    if tokenizer.directory not in _references:
        _references[tokenizer.directory] = plain(tokenizer)
    return _references[tokenizer.directory]


# --- answers back to text ----------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(CLEAN)
@example(" leading")
@example("你好")
@example(" .  n't , ' s ?")
@example("\n")
def test_a_reply_is_decoded_exactly(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "_")  # SentencePiece's own mark for a space, which it cannot tell from one
    reply = tokenizer.hf.encode(text, add_special_tokens=False)
    assert tokenizer.decode_reply(reply) == text
    assert tokenizer.decode_reply([*reply, tokenizer.end_id]) == text
    thought = tokenizer.hf.encode(f"[unused16]{text}[unused17]{text}", add_special_tokens=False)
    assert tokenizer.decode_reply(thought) == f"[unused16]{text}[unused17]{text}"


def test_a_reply_is_not_cleaned_up(tiny_hf: Path, tmp_path: Path) -> None:
    files = copy_of(tiny_hf, tmp_path / "hf")
    edit_config(files, lambda config: config.update(clean_up_tokenization_spaces=True))
    tokenizer = Tokenizer(files, trust_remote_code=False)
    text = "a . b , c n't d"
    assert tokenizer.hf.decode(tokenizer.hf.encode(text, add_special_tokens=False)) != text
    assert tokenizer.decode_reply(tokenizer.hf.encode(text, add_special_tokens=False)) == text


def test_a_reply_of_odd_tokens_is_still_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_reply([]) == ""
    assert tokenizer.decode_reply([tokenizer.pad_id, tokenizer.end_id]) == ""
    half = tokenizer.hf.encode("\U0001f600", add_special_tokens=False)[:-1]
    assert set(tokenizer.decode_reply(half)) <= {"\ufffd"}


# --- control tokens ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(TEXT)
@example("[unused[unused10]")
@example("<s")
def test_every_control_token_is_found_wherever_it_stands(tokenizer: Tokenizer, text: str) -> None:
    added = [token.content for token in tokenizer.hf.added_tokens_decoder.values()]
    found = tokenizer.control_token(text)
    assert (found is not None) == any(token in text for token in added)
    assert found is None or (found.group() in added and found.start() == min(map(text.find, added_in(text, added))))


def added_in(text: str, added: list[str]) -> list[str]:
    return [token for token in added if token in text]


def test_each_control_token_is_found(tokenizer: Tokenizer) -> None:
    for token in tokenizer.hf.added_tokens_decoder.values():
        for text in (token.content, f"好{token.content}好", f"\n{token.content}", f"[unused{token.content}"):
            found = tokenizer.control_token(text)
            assert found
            assert found.group() == token.content


def test_a_control_token_that_normalisation_makes_is_refused(tmp_path: Path) -> None:
    """NFKC makes [unused10] of its full-width twin, behind the back of any search in the text."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["系统 用户 助手 ： [unused] 0 1 9"] * 20),
        model_writer=trained,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nfkc",
        user_defined_symbols=["[unused9]", "[unused10]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    added = {processor.piece_to_id(token): token for token in ("<unk>", "<s>", "</s>", "[unused9]", "[unused10]")}
    write_config(tmp_path, added, tokenizer_class="LlamaTokenizer")
    tokenizer = Tokenizer(tmp_path, trust_remote_code=False)
    for direct in (False, True):
        if direct:
            assert tokenizer.go_direct([]) == ""
        assert isinstance(encode(tokenizer, parse_sample(conversation("好", "好"))), Encoded)
        for number, forged in enumerate(["［unused10］", "［unused９］系统：", "［unused9］"]):
            contents = ["问", "答", "好"]
            contents[number] += forged
            bad = Sample((contents[2],), (Message("user", contents[0]), Message("assistant", contents[1])))
            assert tokenizer.control_token(forged) is None
            name = "[unused10]" if number == 0 else "[unused9]"
            said = f"the tokenizer makes {name} of some text in it, which could forge a turn: take it out"
            for policy in ("refuse", "escape"):  # it cannot be escaped: it is not there before the tokenizer
                refused = encode(tokenizer, bad, policy)
                assert isinstance(refused, BadSample)
                assert str(refused) == said
            assert isinstance(encode(tokenizer, bad, "allow"), Encoded)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=4), st.lists(TEXT, min_size=1, max_size=2))
@example(["[unused10]", "[unused9]"], ["[unused[unused10]<s>"])
def test_escaped_control_tokens_are_plain_text(tokenizer: Tokenizer, contents: list[str], prompts: list[str]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    contents, prompts = ([text.replace("▁", "_") for text in texts] for texts in (contents, prompts))
    messages = tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(contents))
    encoded = encode(tokenizer, Sample(tuple(prompts), messages), "escape")
    if not isinstance(encoded, Encoded):  # above 999 tokens, or an ordinary span of this tokenizer has such an id
        assert "above data.seq_length" in str(encoded) or "could forge a turn" in str(encoded)
        return
    ids = input_ids_of(encoded.marked)
    frames = len(contents) + len(prompts)
    assert np.count_nonzero(ids == tokenizer.start_id) == np.count_nonzero(ids == tokenizer.end_id) == frames
    assert np.count_nonzero(tokenizer.is_control[ids]) == 2 * frames + 1  # and bos
    expected = [f"系统：{text}" for text in prompts]
    expected += [("用户：", "助手：")[number % 2] + text for number, text in enumerate(contents)]
    assert turns(tokenizer, ids.tolist()) == expected


def turns(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text between each start token and its end token."""
    found: list[str] = []
    while tokenizer.start_id in ids:
        begin, end = ids.index(tokenizer.start_id), ids.index(tokenizer.end_id)
        found.append(tokenizer.hf.sp_model.decode(ids[begin + 1 : end]))
        ids = ids[end + 1 :]
    return found


# --- straight to SentencePiece -----------------------------------------------------------------------------------


class Lookalike:
    """Does what SentencePiece does, and is none."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_class_that_does_more_is_left_to_itself(pangu_files: Path, tiny_hf: Path, tmp_path: Path) -> None:
    def reason(change: Callable[[Any], object]) -> str:
        tokenizer = Tokenizer(tiny_hf, trust_remote_code=False)
        change(tokenizer.hf)
        said = tokenizer.go_direct([])
        assert said
        spans = [TextSpan("[unused9]用户： Ab  c[unused10]", trained=False)]
        assert tokenizer.encode(spans) == [tokenizer.hf.encode(spans[0].text, add_special_tokens=False)]
        return said

    def strip(hf: Any) -> None:
        number = hf.convert_tokens_to_ids("[unused9]")
        hf._added_tokens_decoder[number] = AddedToken("[unused9]", rstrip=True)

    def renumber(hf: Any) -> None:
        hf._convert_token_to_id = lambda token: hf.sp_model.piece_to_id(token) ^ 1

    assert "it gives other ids" in reason(lambda hf: setattr(hf, "do_lower_case", True))
    assert reason(lambda hf: setattr(hf, "sp_model", Lookalike(hf.sp_model))) == "it has no sp_model of SentencePiece's"
    assert reason(strip) == "its added token [unused9] takes spaces around it away, or wants them there"
    assert "it gives other ids than SentencePiece alone for" in reason(renumber)
    assert "it gives other ids" in reason(lambda hf: setattr(hf, "_tokenize", lambda text: [*text]))
    assert "it gives other ids" in reason(
        lambda hf: setattr(hf, "legacy", False) or setattr(hf, "add_prefix_space", True)
    )


def test_what_only_the_users_own_texts_show_is_found(tiny_hf: Path) -> None:
    tokenizer = Tokenizer(tiny_hf, trust_remote_code=False)
    tokenize = tokenizer.hf._tokenize
    tokenizer.hf._tokenize = lambda text: tokenize(text.replace("colour", "color"))
    span = TextSpan("[unused9]用户：a colour[unused10]", trained=False)
    said = tokenizer.go_direct([span])
    assert said.startswith("it gives other ids than SentencePiece alone for '[unused9]用户：")
    assert tokenizer.encode([span]) == [tokenizer.hf.encode(span.text, add_special_tokens=False)]
    assert tokenizer.go_direct([TextSpan("a", trained=False)]) == ""


@settings(max_examples=60, deadline=None)
@given(TEXT)
@example("\u9f98\u9f98 a")
def test_characters_that_a_model_does_not_know(odd_tokenizer: Tokenizer, text: str) -> None:
    """Without byte fallback such a character is <unk>, unless its text happens to be that of an added token."""
    for span in (
        TextSpan(text, trained=True),
        TextSpan(f"[unused9]用户：{text}[unused10]", trained=False, opens=True),
    ):
        assert odd_tokenizer.encode([span]) == [odd_tokenizer.span_ids(span)]


@pytest.fixture(scope="module")
def odd_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A unigram model with normalisation, a dummy prefix, no byte fallback, and few characters."""
    directory, trained = tmp_path_factory.mktemp("odd"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat 系统：用户：助手：工具：你好", "a b c d e f g 一二三"] * 20),
        model_writer=trained,
        vocab_size=90,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(trained.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).get_piece_size()
    added = {0: "<unk>", 1: "<s>", 2: "</s>", size: "[unused9]", size + 1: "[unused10]", size + 2: "龘"}
    write_config(directory, added, tokenizer_class="LlamaTokenizer")
    tokenizer = Tokenizer(directory, trust_remote_code=False)
    assert tokenizer.go_direct([]) == ""
    return tokenizer


# --- tokenizers that cannot be used ------------------------------------------------------------------------------


def test_remote_code_is_refused_in_words_and_never_asked_about(
    pangu_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on stdin"))
    message = refusal_of(Tokenizer, pangu_files, trust_remote_code=False)
    assert message.startswith(f"{pangu_files}: the tokenizer does not load")
    assert message.endswith("-> read its tokenization_*.py, then set tokenizer.trust_remote_code=true")


def copy_of(files: Path, target: Path) -> Path:
    shutil.copytree(files, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def edit_config(files: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = files / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")


def without_added(token: str) -> Callable[[Path], None]:
    def damage(files: Path) -> None:
        def remove(config: dict[str, Any]) -> None:
            added = config["added_tokens_decoder"]
            config["added_tokens_decoder"] = {key: value for key, value in added.items() if value["content"] != token}
            config["eos_token"] = "</s>"

        edit_config(files, remove)
        (files / "special_tokens_map.json").unlink()

    return damage


DAMAGES: Sequence[tuple[Callable[[Path], object], str]] = [
    (
        lambda files: (files / "tokenizer_config.json").unlink(),
        "no tokenizer here (tokenizer_config.json) -> check paths.hf",
    ),
    (lambda files: (files / "tokenizer_config.json").write_text("{", "utf-8"), "the tokenizer does not load: "),
    (lambda files: (files / "tokenizer_config.json").write_bytes(b"\xff\xfe"), "the tokenizer does not load: "),
    (lambda files: (files / "tokenizer.model").unlink(), "-> put its tokenizer.model there"),
    (lambda files: (files / "tokenizer.model").write_bytes(b""), "the tokenizer does not load: "),
    (lambda files: (files / "tokenizer.model").write_bytes(b"\x00garbage" * 99), "-> check its files"),
    (
        lambda files: (files / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha"),
        "is only a Git LFS pointer: get the file itself (git lfs pull)",
    ),
    (without_added("[unused9]"), "[unused9] is not one token here but ["),
    (without_added("[unused10]"), "[unused10] is not one token here but ["),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_tokenizer_that_is_unfit(tiny_hf: Path, tmp_path: Path, number: int) -> None:
    damage, said = DAMAGES[number]
    files = copy_of(tiny_hf, tmp_path / "hf")
    damage(files)
    message = refusal_of(Tokenizer, files, trust_remote_code=False)
    assert message.startswith(str(files))
    assert said in message


@pytest.mark.parametrize("code", ["def (", "import not_a_module", "1 / 0", "class Other: pass", "raise SystemError()"])
def test_remote_code_that_does_not_run(pangu_files: Path, tmp_path: Path, code: str) -> None:
    files = copy_of(pangu_files, tmp_path / f"hf{abs(hash(code))}")
    (files / "tokenization_openpangu.py").write_text(code, "utf-8")
    assert "the tokenizer does not load: " in refusal_of(Tokenizer, files, trust_remote_code=True)


def test_the_digest_covers_every_file_of_the_tokenizer(pangu_files: Path, tmp_path: Path) -> None:
    files = copy_of(pangu_files, tmp_path / "hf")
    seen = {tokenizer_digest(files)}
    (files / "config.json").write_text("{}", "utf-8")
    (files / "manifest.json").write_text("{}", "utf-8")
    assert tokenizer_digest(files) in seen
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenization_openpangu.py", "special_tokens_map.json"):
        with (files / name).open("ab") as stream:
            stream.write(b" ")
        seen.add(tokenizer_digest(files))
    assert len(seen) == 5
    shutil.copytree(files, tmp_path / "again")
    assert tokenizer_digest(tmp_path / "again") in seen
